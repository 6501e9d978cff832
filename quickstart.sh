#!/usr/bin/env bash
# Command 1: set up once, then run the whole pipeline on the embedded defaults.  ./quickstart.sh [--short] [--no-vllm]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup_env.sh
exec "$PYTHON" slm_swap/demo/quickstart.py "$@"
