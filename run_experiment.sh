#!/usr/bin/env bash
# Runs one experiment from start to end (server, benchmark, results): ./run_experiment.sh [FILE] [flags].
# FILE, where given, comes first; --help tells the flags.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"
setup_env requirements.txt
case ${1:-} in
  ''|-*) set -- "$ROOT/ml_inference_server/experiments/minilm_baseline.yaml" "$@" ;;
esac
exec "$PYTHON" -P -m ml_inference_server.benchmark.runner "$@"
