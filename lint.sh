#!/usr/bin/env bash
# Checks format, style, types, shell scripts, the Containerfile and generated stubs; changes nothing.
# ./lint.sh --fix formats, fixes what ruff can fix and regenerates the stubs first.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup_env.sh
. "$(dirname -- "$0")/setup_env.sh"

fix=false
case $#:${1:-} in
  0:) ;;
  1:--fix) fix=true ;;
  *) fail 2 "usage: ./lint.sh [--fix]" ;;
esac
setup_env requirements-dev.txt
cd -- "$ROOT"
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
failed=""
proto=ml_inference_server/proto

step() { # title, command...
  local title=$1
  shift
  printf '%-24s' "$title"
  if run_child "$@" >"$scratch/output" 2>&1; then
    echo ok
  else
    echo FAILED
    cat -- "$scratch/output"
    failed="$failed${failed:+, }$title"
  fi
}

generate_stubs() { # folder
  "$PYTHON" -m grpc_tools.protoc -I . --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" "$proto/inference.proto" &&
    "$PYTHON" -m grpc_tools.protoc -I . --python_out="$1" --pyi_out="$1" "$proto/error_details.proto" "$proto"/foreign/*.proto
}

compare_stubs() {
  local stub status=0
  generate_stubs "$scratch" || return 1
  for stub in "$proto"/*_pb2* "$proto"/foreign/*_pb2*; do
    diff -u "$stub" "$scratch/$stub" || status=1
  done
  for stub in "$scratch/$proto"/*_pb2* "$scratch/$proto"/foreign/*_pb2*; do
    [ -e "${stub#"$scratch/"}" ] || { echo "${stub#"$scratch/"} is missing" && status=1; }
  done
  [ "$status" = 0 ] || echo "The stubs do not match the .proto files: run ./lint.sh --fix"
  return "$status"
}

if [ "$fix" = true ]; then
  step "ruff check --fix" "$PYTHON" -m ruff check --fix-only .
  step "ruff format" "$PYTHON" -m ruff format .
  step "clang-format -i" find ml_inference_server tests \( -name '*.cpp' -o -name '*.h' \) -exec "$(dirname -- "$PYTHON")/clang-format" -i {} +
  step "generate stubs" generate_stubs .
fi
step "ruff format --check" "$PYTHON" -m ruff format --check .
step "ruff check" "$PYTHON" -m ruff check .
step "clang-format" find ml_inference_server tests \( -name '*.cpp' -o -name '*.h' \) -exec "$(dirname -- "$PYTHON")/clang-format" --dry-run -Werror {} +
step "mypy --strict" "$PYTHON" -m mypy
step "shellcheck" find . \( -name '.venv*' -o -name venv -o -name .git -o -name node_modules \) -prune -o \
  \( -name '*.sh' -o -path ./.ci/run \) -exec "$(dirname -- "$PYTHON")/shellcheck" -x {} +
step "hadolint" find ml_inference_server -name Containerfile -exec "$(dirname -- "$PYTHON")/hadolint" {} +
step "stubs match the proto" compare_stubs

if [ -n "$failed" ]; then
  echo "Lint FAILED: $failed"
  exit 1
fi
echo "Lint ok."
