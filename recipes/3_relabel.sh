#!/usr/bin/env bash
# Stage 3: rewards become training targets for best-of-4, ranked among 16 draws; the best and the worst response of
# each prompt are trained on. The budget is that of the training responses: on other prompts, with no more than these
# 96 to learn from, less is spent, 1.9 and 0.5 nats with two sets of draws. And plain pairs of the same responses for
# the DPO baseline.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}

ctrl-dpo relabel "$RUNS/train/scored" --output "$RUNS/train/groups" --procedure best_of_4 --target-kl 2.2 --extremes 1
ctrl-dpo relabel "$RUNS/train/scored" --output "$RUNS/train/pairs" --procedure best_of_4 --target-kl 2.2 \
    --pairs best_worst
