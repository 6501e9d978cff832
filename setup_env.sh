#!/usr/bin/env bash
# Make or reuse the virtual environment; sourced by quickstart.sh and run_tests.sh. Sets PYTHON, and takes --no-vllm out of their flags: it leaves
# vLLM out where there is a CUDA GPU, then and whenever requirements change.
choice=
for flag; do
  shift
  if [ "$flag" = --no-vllm ]; then choice=-no-vllm; else set -- "$@" "$flag"; fi
done
requirements=requirements-cpu.txt
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  requirements=requirements.txt
fi
PYTHON=$PWD/.venv/bin/python
if compgen -G '.venv/installed-*-no-vllm' >/dev/null; then choice=-no-vllm; fi  # what was left out stays out
stamp=.venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$requirements
if [ ! -e "$stamp" ] && [ ! -e "$stamp-no-vllm" ]; then
  base=${PYTHON_BASE:-python3}
  "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
    { echo "error: $base is not Python 3.11 to 3.13: install one and set PYTHON_BASE to it" >&2; exit 2; }
  "$base" -m venv .venv || { echo "error: cannot make .venv: install Python's venv module (python3-venv)" >&2; exit 2; }
  echo "installing $requirements${choice:+ without vllm} into .venv (once; some minutes)"
  # torch first and pinned: left to other packages it may come as a build of another size
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements-cpu.txt)"
  wanted=$requirements
  if [ -n "$choice" ]; then
    wanted=.venv/requirements.txt
    grep -hv '^vllm==\|^-r ' requirements-cpu.txt "$requirements" | sort -u >"$wanted"
  fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$wanted"
  rm -f .venv/installed-*
  touch "$stamp$choice"
fi
