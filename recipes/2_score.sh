#!/usr/bin/env bash
# Stage 2: a reward for every response; here the VADER sentiment of the text, so a policy learns to be positive.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}
here=$(dirname "$0")

for draws in train held_out/reference; do
    PYTHONPATH=$here ctrl-dpo score "$RUNS/$draws/draws" --reward sentiment_reward:compound \
        --output "$RUNS/$draws/scored"
done
