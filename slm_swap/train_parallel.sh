#!/usr/bin/env bash
# Fine-tune both tracks at once, each on half of the GPUs: ./train_parallel.sh [train_unsloth.py's flags]
# CUDA_VISIBLE_DEVICES is respected; one GPU takes one track after the other, without any each is a process on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  mapfile -t gpus < <(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep . || true)
else
  mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' || true)
fi
[ "${#gpus[@]}" -ne 1 ] || exec ./train_sequential.sh "$@"
half=$((${#gpus[@]} / 2))
children=()
trap 'kill "${children[@]}" 2>/dev/null; wait; echo "interrupted" >&2; exit 130' INT TERM

start() { # track, its GPUs: a process each, at a port that torchrun finds free
  local track=$1 mine=$2 flags=("${@:3}") launcher=(python) count
  count=$(tr ',' '\n' <<<"$mine" | grep -c . || true)
  [ "$count" -lt 2 ] || launcher=(torchrun --standalone --nproc_per_node="$count")
  echo "$track: ${launcher[0]} on GPUs ${mine:-none}, log 04_ft/adapter_$track.log"
  CUDA_VISIBLE_DEVICES=$mine "${launcher[@]}" train_unsloth.py --track "$track" --train "02_dataset/$track/train.jsonl" \
    --val "02_dataset/$track/val.jsonl" --out "04_ft/adapter_$track" --preset auto "${flags[@]}" >"04_ft/adapter_$track.log" 2>&1 &
  children+=($!)
}

mkdir -p 04_ft
start structured "$(IFS=,; echo "${gpus[*]:0:half}")" "$@"
start toolcall "$(IFS=,; echo "${gpus[*]:half}")" "$@"
status=0
for at in 0 1; do
  track=$([ "$at" = 0 ] && echo structured || echo toolcall)
  if wait "${children[$at]}"; then echo "$track: done"; else echo "$track: failed with exit code $?" >&2; status=1; fi
done
exit "$status"
