#!/usr/bin/env bash
# Lint, types and all tests on a fresh machine, on all its cores. Arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

ruff check .
ruff format --check .
mypy
exec python -m pytest -n logical "$@" # how tests share the cores: tests/conftest.py
