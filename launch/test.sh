#!/usr/bin/env bash
# The suite of every day: makes its environment, checks the style, runs all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "Error: ruff format would change files; run .venv/bin/ruff format ." >&2; exit 1; }
$python -m pytest -n 2 --durations=15 "$@"
