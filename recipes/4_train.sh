#!/usr/bin/env bash
# Stage 4: train two policies on the same draws with the same number of updates: ours, and plain DPO.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")

ctrl-dpo train "$RUNS/model" "$RUNS/train/groups" --config "$here/configs/quickstart_ctrl.yaml" \
    --output_dir "$RUNS/ctrl/adapter"
ctrl-dpo train "$RUNS/model" "$RUNS/train/pairs" --config "$here/configs/quickstart_dpo.yaml" \
    --output_dir "$RUNS/dpo/adapter"
