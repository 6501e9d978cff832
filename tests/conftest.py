"""What several tests need: the stage scripts as modules, and rows in files."""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from slm_swap.cli import run
from tests.support import processes
from tests.support.disks import mounted
from tests.support.scripts import load_script

# Several tests fork: a child would wait for threads of torch's that are not there. Before anything imports it.
os.environ["OMP_NUM_THREADS"] = "1"
# pytest and the scripts would compile the same files again and again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A job that a shell starts in the background ignores Ctrl-C, and so do its children: the tests that interrupt need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says how busy the machine is.
settings.register_profile("slm_swap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slm_swap")


def pytest_configure(config: pytest.Config) -> None:
    """One server for all of xdist's workers, which have this process' environment."""
    if not hasattr(config, "workerinput"):
        server = processes.server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


@pytest.fixture(scope="session")
def eval_script() -> ModuleType:
    return load_script("01_eval/eval.py")


@pytest.fixture(scope="session")
def compare_script() -> ModuleType:
    return load_script("03_compare/compare.py")


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes rows (values, or lines as they stand) to a file below `tmp_path` and gives its path."""

    def write(name: str, rows: list) -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 8 MiB."""
    with mounted(tmp_path / "disk", 8) as made:
        yield made


@pytest.fixture
def run_script(monkeypatch, capsys):
    """A function that runs a stage script's `main` as from the command line, untraced: (exit code, stdout, stderr)."""
    monkeypatch.setenv("LANGFUSE_DISABLED", "1")

    def run_it(script: ModuleType, *argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            run(lambda: script.main([str(word) for word in argv]))
        return left.value.code, *capsys.readouterr()

    return run_it
