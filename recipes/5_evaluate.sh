#!/usr/bin/env bash
# Stage 5: fresh draws of both policies on held-out prompts, scored, against those of the reference policy.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")
set -m  # a group of processes of its own for the one in the background

measure() {
    ctrl-dpo sample "$RUNS/$1/adapter" "$here/data/held_out_prompts.jsonl" \
        --output "$RUNS/held_out/$1/draws" --load-in-8bit --log-ratios \
        --draws 16 --max-new-tokens 32 --seed 3
    PYTHONPATH=$here ctrl-dpo score "$RUNS/held_out/$1/draws" --reward sentiment_reward:compound \
        --output "$RUNS/held_out/$1/scored"
    ctrl-dpo evaluate --policy "$RUNS/held_out/$1/scored" --reference "$RUNS/held_out/reference/scored" \
        --name "$1" --output "$RUNS/$1/evaluation"
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
measure ctrl &
job=$!
trap 'kill -- -$job 2>/dev/null || true' EXIT
measure dpo
wait $job
