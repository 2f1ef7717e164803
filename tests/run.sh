#!/usr/bin/env bash
# Set up a virtual environment of its own and run every check: lint, types, layers, doctests, tests, coverage.
#   bash tests/run.sh            all of it
#   bash tests/run.sh -k theory  pytest arguments: only those tests, without the coverage floor
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${CTRL_DPO_TEST_VENV:-.venv-test}

stamp="$venv/.installed-$(cat pyproject.toml recipes/constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c recipes/constraints.txt torch
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c recipes/constraints.txt -e '.[dev,demo,bench]'
    touch "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# a data cache of its own: what another run left must not decide what this one tests
HF_DATASETS_CACHE=$(mktemp -d)
export HF_DATASETS_CACHE
trap 'rm -rf "$HF_DATASETS_CACHE"' EXIT

if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
ruff check .
ruff format --check .
mypy
lint-imports
# one test process a core, each on one thread
OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 4 --dist worksteal -m "not gpu" --cov --cov-report=term
