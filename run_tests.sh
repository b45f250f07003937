#!/usr/bin/env bash
# Runs the tests: ./run_tests.sh [pytest arguments]. Without a path among them, all tests.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"
setup_env requirements-dev.txt
names_a_path=false
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then
    names_a_path=true
  fi
done
if [ "$names_a_path" = false ]; then
  set -- "$@" "$ROOT/tests"
fi
exec "$PYTHON" -P -m pytest -c "$ROOT/pyproject.toml" "$@"
