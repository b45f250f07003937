#!/usr/bin/env bash
# Runs one experiment from start to end (server, benchmark, results): ./run_experiment.sh [FILE] [flags].
# Without FILE: the baseline on few rows, for a first look. --help tells the flags.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"
setup_env requirements.txt
exec "$PYTHON" -P -m ml_inference_server.benchmark.runner "$@"
