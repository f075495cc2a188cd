#!/usr/bin/env bash
# Lint, types, documentation and all tests on a fresh machine, on all its cores.
# Arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
# Where this is set, as in many images of Docker, each process compiles all that it imports: a fifth of the tests' time.
unset PYTHONDONTWRITEBYTECODE
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

ruff check .
ruff format --check .
mypy & # takes one core a minute; on another one meanwhile:
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet # into build/site; a link to nowhere is an error
python -m pytest --collect-only -q "$@" > /dev/null || true # so that workers find compiled what tests import
wait "$!"
wait # for what .ci/run installs
workers=$(( $(nproc) * 3 / 2 )) # a quarter of the time a test waits
exec python -m pytest -n "$workers" "$@" # how tests share the cores: tests/conftest.py
