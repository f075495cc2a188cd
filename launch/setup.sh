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
fi
# By uv, in a third of pip's time. It knows pip's settings by other names; where there are more of them, or uv cannot
# be had or fails, pip does it.
install_packages() { # PYTHON REQUIREMENT...
  local python=$1 pip=(-m pip --quiet --disable-pip-version-check) more=""
  shift
  (
    settings=$("$python" -m pip config list 2> /dev/null | sed 's/^:env:/~/' | LC_ALL=C sort) # of the environment last
    while IFS="=" read -r name value; do
      value=${value//\\n/ } value=$(xargs <<< "${value//\'/}") # words in a row
      case ${name##*.} in
        index-url) export UV_DEFAULT_INDEX=$value ;;
        extra-index-url) more=$value ;;
        find-links) export UV_FIND_LINKS=${value// /,} ;;
        constraint) export UV_CONSTRAINT=$value ;;
        cert) export SSL_CERT_FILE=$value ;;
        "" | cache-dir | config-file | *timeout | *-version-check | progress-bar | quiet | retries | root-user-action) ;;
        *) exit 1 ;;
      esac
    done <<< "$settings"
    # Of one release the first index has the say, where pip takes the best file.
    [[ -z $more ]] ||
      export UV_INDEX="${UV_DEFAULT_INDEX:-https://pypi.org/simple} $more" UV_INDEX_STRATEGY=unsafe-best-match
    { [[ -x $VENV/bin/uv ]] || "$VENV/bin/python" "${pip[@]}" install uv; } &&
      "$VENV/bin/uv" pip install --quiet --python "$python" "$@"
  ) || {
    "$python" "${pip[@]}" install --upgrade pip || true # one of today chooses twice as fast
    "$python" "${pip[@]}" install "$@"
  }
}
install_packages "$VENV/bin/python" -e ".[$1]"
PATH="$(cd "$VENV/bin" && pwd):$PATH" # VENV may be absolute or relative
export PATH
