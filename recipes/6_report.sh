#!/usr/bin/env bash
# Stage 6: tables and pictures: where both policies stand under the exact frontier. And cards for the hub.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}

ctrl-dpo report "$RUNS/ctrl/evaluation" "$RUNS/dpo/evaluation" --output "$RUNS/report" \
    --training "ctrl=$RUNS/ctrl/adapter" --training "dpo=$RUNS/dpo/adapter" \
    --labels "$RUNS/train/groups"
