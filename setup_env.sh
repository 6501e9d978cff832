#!/usr/bin/env bash
# Make or reuse the virtual environment; sourced by quickstart.sh and run_tests.sh. Sets PYTHON.
requirements=requirements-cpu.txt
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  requirements=requirements.txt
fi
PYTHON=$PWD/.venv/bin/python
stamp=.venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$requirements
if [ ! -e "$stamp" ]; then
  base=${PYTHON_BASE:-python3}
  "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
    { echo "error: $base is not Python 3.11 to 3.13: install one and set PYTHON_BASE to it" >&2; exit 2; }
  "$base" -m venv .venv || { echo "error: cannot make .venv: install Python's venv module (python3-venv)" >&2; exit 2; }
  echo "installing $requirements into .venv (once; some minutes)"
  # torch first and pinned: left to other packages it may come as a build of another size
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements-cpu.txt)"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  rm -f .venv/installed-*
  touch "$stamp"
fi
