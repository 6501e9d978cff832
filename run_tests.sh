#!/usr/bin/env bash
# Command 2: set up once, then run the tests (no GPU, no network).  ./run_tests.sh [--no-vllm] [pytest's flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup_env.sh
"$PYTHON" -m ruff check .
"$(dirname "$PYTHON")/lint-imports" --no-logo --no-cache
# One thread a process: torch's threads would wait for each other on a busy machine.
cores=$(nproc)  # before the next line, which nproc heeds
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# One worker more than cores: many tests wait for a server or a process and leave theirs idle.
exec "$PYTHON" -m pytest -n "$((cores + 1))" --dist worksteal "$@"
