"""eval.py in a process that can be killed: a fork of one that has the heavy packages loaded already, so that it starts at once."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

EVAL = Path(__file__).resolve().parents[2] / "slm_swap/01_eval/eval.py"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["openai", "torch", "transformers"])


def start(argv: list, environment: dict[str, str], log: Path) -> multiprocessing.Process:
    """Run `eval.py ARGV`; both its outputs go to the end of a file."""
    process = _CONTEXT.Process(target=_run, args=([str(word) for word in argv], environment, str(log)))
    process.start()
    return process


def _run(argv: list[str], environment: dict[str, str], log: str) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "LANGFUSE_"))]:
        del os.environ[name]
    os.environ.update(environment)
    sys.argv = [str(EVAL), *argv]
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    runpy.run_path(str(EVAL), run_name="__main__")
