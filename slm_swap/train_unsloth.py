"""Runs 04_ft/train_unsloth.py, so that the launch commands work from this folder."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "04_ft/train_unsloth.py"), run_name="__main__")
