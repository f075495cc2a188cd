# Sourced by the scripts here: makes the virtual environment of this checkout, once, and installs rvc_dist into it.
# Where `rvc-dist files` copied them, takes the rvc_dist of VENV, or of the python on the PATH.
# Usage: source launch/setup.sh EXTRAS      Honours PYTHON (interpreter) and VENV (folder of the environment).
# shellcheck shell=bash
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv}
if [[ ! -d rvc_dist ]]; then
  [[ ! -x $VENV/bin/python ]] || PATH="$(cd "$VENV/bin" && pwd):$PATH"
  python -c 'import rvc_dist' 2> /dev/null ||
    { echo "rvc_dist is neither in $VENV nor in the python on the PATH; say where with VENV=/path/to/environment" >&2; exit 1; }
  export PATH
  return
fi
if [[ ! -x $VENV/bin/python ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "rvc_dist needs Python 3.10 or newer; say which with PYTHON=/path/to/python" >&2; exit 1; }
  "${PYTHON:-python3}" -m venv "$VENV"
  # The pip that comes with Python may take twice as long to choose versions; it does, where no newer one is found.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip || true
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$1]"
PATH="$(cd "$VENV/bin" && pwd):$PATH" # VENV may be absolute or relative
export PATH
