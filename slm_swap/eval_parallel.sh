#!/usr/bin/env bash
# Evaluate the local model on every GPU, one replica each: ./eval_parallel.sh --track toolcall --model-kind slm [eval.py's flags]
# CUDA_VISIBLE_DEVICES is respected; without a GPU, or with one, it is eval.py itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
else
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
launcher=(python)
[ "$gpus" -lt 2 ] || launcher=(torchrun --standalone --nproc_per_node="$gpus")
exec "${launcher[@]}" 01_eval/eval.py "$@"
