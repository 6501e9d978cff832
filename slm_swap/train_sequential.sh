#!/usr/bin/env bash
# Fine-tune both tracks, one after the other on all GPUs: ./train_sequential.sh [train_unsloth.py's flags]
# CUDA_VISIBLE_DEVICES is respected; without a GPU each track is one process on the CPU. Logs: 04_ft/adapter_<track>.log
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
else
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
launcher=(python)
[ "$gpus" -lt 2 ] || launcher=(torchrun --standalone --nproc_per_node="$gpus")
child=
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; wait; echo "interrupted" >&2; exit 130' INT TERM
mkdir -p 04_ft
status=0
for track in structured toolcall; do
  echo "$track: ${launcher[0]} on $gpus GPUs, log 04_ft/adapter_$track.log"
  "${launcher[@]}" train_unsloth.py --track "$track" --train "02_dataset/$track/train.jsonl" --val "02_dataset/$track/val.jsonl" \
    --out "04_ft/adapter_$track" --preset auto "$@" >"04_ft/adapter_$track.log" 2>&1 &
  child=$!
  if wait "$child"; then
    echo "$track: done"
  else
    echo "$track: failed with exit code $?" >&2
    status=1
  fi
done
exit "$status"
