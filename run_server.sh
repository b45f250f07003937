#!/usr/bin/env bash
# Starts the server: ./run_server.sh [--experiment FILE] [--set key.path=value] ...; --help tells every flag.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"
setup_env requirements.txt
exec "$PYTHON" -P -m ml_inference_server.main "$@"
