#!/usr/bin/env bash
# Stage 5: fresh draws of both policies on held-out prompts, scored, against those of the reference policy.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")

for policy in ctrl dpo; do
    ctrl-dpo sample "$RUNS/$policy/adapter" "$here/data/held_out_prompts.jsonl" \
        --output "$RUNS/held_out/$policy/draws" --load-in-8bit --log-ratios \
        --draws 16 --max-new-tokens 32 --seed 3
    PYTHONPATH=$here ctrl-dpo score "$RUNS/held_out/$policy/draws" --reward sentiment_reward:compound \
        --output "$RUNS/held_out/$policy/scored"
    ctrl-dpo evaluate --policy "$RUNS/held_out/$policy/scored" --reference "$RUNS/held_out/reference/scored" \
        --name "$policy" --output "$RUNS/$policy/evaluation"
done
