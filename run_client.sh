#!/usr/bin/env bash
# Measures a running server: ./run_client.sh --batch-size 4 --concurrency 8 --requests 100; --help tells every flag.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"
setup_env requirements.txt
exec "$PYTHON" -P -m ml_inference_server.client "$@"
