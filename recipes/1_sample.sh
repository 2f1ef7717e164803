#!/usr/bin/env bash
# Stage 1: the reference policy answers every training prompt, and every held-out one, once.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")

ctrl-dpo demo --output "$RUNS/model"
ctrl-dpo sample "$RUNS/model" "$here/data/train_prompts.jsonl" --output "$RUNS/train/draws" \
    --load-in-8bit --draws 16 --max-new-tokens 32 --seed 1
ctrl-dpo sample "$RUNS/model" "$here/data/held_out_prompts.jsonl" --output "$RUNS/held_out/reference/draws" \
    --load-in-8bit --draws 16 --max-new-tokens 32 --seed 2
