#!/usr/bin/env bash
# Stage 6: tables and pictures: where both policies stand under the exact frontier.
set -euo pipefail
RUNS=${RUNS:-runs/quickstart}

ctrl-dpo report "$RUNS/ctrl" "$RUNS/dpo" --output "$RUNS/report"
