#!/usr/bin/env bash
# Stage 4: train two policies on the same draws with the same number of updates: ours, and plain DPO. Both at once, each
# on half of the cores: passes of a few hundred tokens keep one core busier than several.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
set -m  # a group of processes of its own for the one in the background

ctrl-dpo train "$RUNS/model" "$RUNS/train/groups" --config "$here/configs/quickstart_ctrl.yaml" \
    --output_dir "$RUNS/ctrl/adapter" &
job=$!
trap 'kill -- -$job 2>/dev/null || true' EXIT
ctrl-dpo train "$RUNS/model" "$RUNS/train/pairs" --config "$here/configs/quickstart_dpo.yaml" \
    --output_dir "$RUNS/dpo/adapter"
wait $job
