#!/usr/bin/env bash
# The suite of every day: makes its environment, checks the style, runs all tests. Arguments go to pytest.
#
#   launch/test.sh --all     the long tests too, within 70 minutes: Ray, the page in a browser (installed into .venv; Chromium where
#                            there is one), linters, 50 kills, long fuzzing
set -euo pipefail
all="" arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then all=yes; else arguments+=("$argument"); fi
done
source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "Error: ruff format would change files; run .venv/bin/ruff format ." >&2; exit 1; }
if [ -n "$all" ]; then
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements-ray.txt -r requirements-app.txt -r requirements-browser.txt \
    -r requirements-lint.txt
  export JAXDIT_KILLS="${JAXDIT_KILLS:-50}" FUZZ_COUNT="${FUZZ_COUNT:-300000}"
  arguments=(-m "" ${arguments[@]+"${arguments[@]}"})
fi
# worksteal: neighbours stay in one process, so that what a file of tests prepares is prepared once.
$python -m pytest -n 2 --dist=worksteal --durations=15 ${arguments[@]+"${arguments[@]}"}
