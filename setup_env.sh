#!/usr/bin/env bash
# Finds or makes the Python environment of the other scripts, which source this file and call `setup_env FILE`:
# it sets PYTHON to an interpreter that has everything of FILE, and PYTHONPATH so that no script has to leave the
# caller's folder. Run by itself it only prepares: ./setup_env.sh [requirements.txt | requirements-dev.txt]
# Here is what only a shell can do: find a Python and obey signals. The rest is setup_env.py.
#
# Written for bash 3.2 and POSIX tools, because that is what a Mac has.

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
VENV="$ROOT/.venv"
HELPER="$ROOT/setup_env.py"
PYTHON=""

# What is opened next would take the number of a stream that the caller has closed, and be printed into.
{ : <&0; } 2>/dev/null || exec </dev/null
{ : >&1; } 2>/dev/null || exec >/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null

say() { printf '%s\n' "$*" >&2; }

fail() { # exit status, message
  local status=$1
  shift
  say "${0##*/}: $*"
  exit "$status"
}

# A signal must end what this script started (pip and its own children) before it ends the script.
on_signal() { # exit status
  local leader
  trap '' INT TERM HUP
  for leader in $(jobs -p); do
    kill -TERM -- "-$leader" 2>/dev/null || true
  done
  wait 2>/dev/null || true
  exit "$1"
}

catch_signals() {
  trap 'on_signal 130' INT
  trap 'on_signal 143' TERM
  trap 'on_signal 129' HUP
}

# Runs a command in a process group of its own and waits in a way that a signal interrupts at once.
run_child() { # command...
  local status=0
  set -m
  "$@" </dev/null &
  set +m
  wait "$!" || status=$?
  return "$status"
}

# Prints "3.12" for a Python that is really there. The name alone proves nothing: pyenv's shims exist for versions
# that are not installed, and a virtual environment outlives the Python that it was made from.
version_of() { # python
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# What of the requirements is not installed as they ask, on one line; nothing when all is there.
lacking() { # python, requirements file
  "$1" -E -P "$HELPER" lacking "$2"
}

is_complete() { # python, requirements file
  local version missing
  version=$(version_of "$1") && is_new_enough "$version" && missing=$(lacking "$1" "$2") && [ -z "$missing" ]
}

is_new_enough() { # version, such as 3.12
  case $1 in
    3.?|3.10|2.*) return 1 ;;
  esac
}

# Sets PYTHON to a Python that can make the environment. torch has no wheel for 3.15 yet, hence the upper end.
find_python() {
  local name version tried="" without_venv=""
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    version=$(version_of "$name") || continue
    case $version in
      3.11|3.12|3.13|3.14)
        if "$name" -I -c 'import ensurepip, venv' 2>/dev/null; then
          PYTHON=$name
          return
        fi
        without_venv=$name
        ;;
      *) tried="$tried, $name is $version" ;;
    esac
  done
  if [ -n "$without_venv" ]; then
    fail 2 "$without_venv cannot make virtual environments: run 'sudo apt install python3-venv', then this script again"
  fi
  fail 2 "Python 3.11 to 3.14 is needed${tried:- and no Python was found}:" \
    "install one ('brew install python@3.13' on macOS, 'sudo apt install python3 python3-venv' on Debian and Ubuntu)"
}

# An environment that the caller has activated is used as it is; nothing is installed into it unasked.
use_active() { # its folder, requirements file
  local version missing installer="python -m pip"
  PYTHON="$1/bin/python"
  version=$(version_of "$PYTHON") ||
    fail 2 "the active environment $1 has no Python that runs: deactivate it and try again"
  is_new_enough "$version" ||
    fail 2 "the active environment $1 has Python $version and 3.11 or newer is needed: deactivate it and try again"
  missing=$(lacking "$PYTHON" "$2")
  if [ -n "$missing" ]; then
    "$PYTHON" -I -c 'import pip' 2>/dev/null || installer="uv pip"
    fail 2 "the active environment $1 lacks $missing: run '$installer install -r $(printf %q "$ROOT/$2")'," \
      "or deactivate it and this script makes its own"
  fi
}

setup_env() { # requirements.txt or requirements-dev.txt
  local active=${VIRTUAL_ENV:-}
  catch_signals
  if [ -z "$active" ] && [ -n "${CONDA_PREFIX:-}" ]; then
    # Conda activates `base` in every terminal unasked: it counts as chosen only if it has what is needed.
    if [ "${CONDA_DEFAULT_ENV:-}" != base ] || is_complete "$CONDA_PREFIX/bin/python" "$1"; then
      active=$CONDA_PREFIX
    fi
  fi
  if [ -n "$active" ] && [ "$active" != "$VENV" ] && ! [ "$active" -ef "$VENV" ]; then
    use_active "$active" "$1"
  elif "$VENV/bin/python" -I "$HELPER" current "$1" 2>/dev/null; then
    PYTHON="$VENV/bin/python"
  elif is_complete "$ROOT/venv/bin/python" "$1"; then
    PYTHON="$ROOT/venv/bin/python"
  else
    find_python
    run_child "$PYTHON" -I "$HELPER" build "$1" || exit "$?"
    PYTHON="$VENV/bin/python"
  fi
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  [ "$#" -le 1 ] || fail 2 "expected one file, not $#: what Ray or tracing needs is added with pip install -r"
  case ${1:-requirements.txt} in
    requirements.txt|requirements-dev.txt) setup_env "${1:-requirements.txt}" ;;
    *) fail 2 "expected requirements.txt or requirements-dev.txt, not $1" ;;
  esac
  say "Ready: $PYTHON"
fi
