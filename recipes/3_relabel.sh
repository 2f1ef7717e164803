#!/usr/bin/env bash
# Stage 3: rewards become training targets for best-of-4 at 1 nat; and plain pairs for the DPO baseline.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}

ctrl-dpo relabel "$RUNS/train/scored" --output "$RUNS/train/groups" --procedure best_of_4 --target-kl 1
ctrl-dpo relabel "$RUNS/train/scored" --output "$RUNS/train/pairs" --procedure best_of_4 --target-kl 1 \
    --pairs best_worst
