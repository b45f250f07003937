#!/usr/bin/env bash
# What the project takes from others: locked, listed, and asked for known holes.
#   ./supply_chain.sh lock [--upgrade]   writes requirements.lock and the container's builder.lock; --upgrade takes the newest versions
#   ./supply_chain.sh sbom FILE.json     lists requirements.lock as CycloneDX; needs no network
#   ./supply_chain.sh audit              asks PyPI's advisories about each version in the locks; needs the network
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"

readonly USAGE="usage: ./supply_chain.sh lock [--upgrade] | sbom FILE.json | audit"
readonly CONTAINER=ml_inference_server/deploy/container
case $#:${1:-}:${2:-} in
  1:lock: | 2:lock:--upgrade | 1:audit:) ;;
  2:sbom:?*) file=$(CDPATH='' cd -- "$(dirname -- "$2")" && pwd)/$(basename -- "$2") ;;
  *) fail 2 "$USAGE" ;;
esac
setup_env requirements-dev.txt
cd -- "$ROOT"
programs=$(dirname -- "$PYTHON")

# For every system and every Python that the project runs on, each file with its hash; versions stay where they still fit.
compile() { # arguments of uv pip compile
  run_child "$programs/uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-header "$@"
}

audit() { # lock file
  local status=0 told
  told=$("$programs/pip-audit" --requirement "$1" --require-hashes --disable-pip --strict --progress-spinner off 2>&1) || status=$?
  printf '%s\n' "$told"
  case $status:$told in
    0:*) ;;
    *:*"could not be audited"* | *:*ConnectionError* | *:*ServiceError*)
      fail 5 "$1 was NOT audited: PyPI's advisories do not answer here (no network, or a mirror without them): run it where they do"
      ;;
    *) fail 1 "$1 has versions with known holes: raise them in pyproject.toml where their range forbids it, then" \
      "./supply_chain.sh lock --upgrade" ;;
  esac
}

case $1 in
  lock)
    compile --all-extras pyproject.toml --output-file requirements.lock ${2:+"$2"}
    compile "$CONTAINER/builder.in" --output-file "$CONTAINER/builder.lock" ${2:+"$2"}
    echo "requirements.lock and $CONTAINER/builder.lock are written."
    ;;
  sbom)
    run_child "$programs/cyclonedx-py" requirements requirements.lock --pyproject pyproject.toml --mc-type application \
      --output-reproducible --output-format JSON --output-file "$file"
    echo "$file lists requirements.lock."
    ;;
  audit)
    audit requirements.lock
    audit "$CONTAINER/builder.lock"
    ;;
esac
