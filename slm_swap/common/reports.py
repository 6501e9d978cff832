"""Writing results: atomically, with what made them."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import IO, Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.os_errors import ELSEWHERE, reading, writing
from slm_swap.common.settings import PACKAGE, ROOT, real_path, shown_path
from slm_swap.common.temporary import beside, remove_leftovers

SCHEMA_VERSION = 1
PACKAGES = (
    "torch",
    "transformers",
    "llguidance",
    "bitsandbytes",
    "accelerate",
    "deepspeed",
    "unsloth",
    "trl",
    "peft",
    "datasets",
    "openai",
    "langfuse",
    "vllm",
)

_LINE_ENCODER = ExactEncoder(ensure_ascii=False, allow_nan=False)


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_atomically(path: str | Path, write: Callable[[IO[str]], object], advice: str = ELSEWHERE) -> None:
    """Write a text file beside its place and rename it: readers see the old file or the new one, never half of one. A symbolic link stays
    one: it is the file behind it that is written.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full; `advice` is what to do where the error does not say.
    """
    path = real_path(path)
    with writing(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with beside(path) as temporary:
            with open(temporary, "w", encoding="utf-8") as stream:
                os.fchmod(stream.fileno(), 0o644)  # whatever the umask: the team may read it
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)


def write_json(path: str | Path, value: Any, advice: str = ELSEWHERE) -> None:
    """One JSON document: sorted keys, no NaN. `advice` is that of `write_atomically`."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda stream: stream.write(text), advice)


def json_line(row: dict) -> str:
    """One JSON object as a line: no NaN, a Decimal by its own digits."""
    return _LINE_ENCODER.encode(row) + "\n"


def json_text(text: str | bool | None) -> str:
    """A text as it stands in `json_line`."""
    return "null" if text is None else _LINE_ENCODER.encode(text)


def write_jsonl(path: str | Path, rows: Iterable[dict], advice: str = ELSEWHERE) -> None:
    """One JSON object a line: no NaN. `advice` is that of `write_atomically`."""

    def write(stream: IO[str]) -> None:
        for row in rows:
            stream.write(json_line(row))

    write_atomically(path, write, advice)


def read_json(path: str | Path, made_by: str) -> dict:
    """A JSON object from a file that `made_by` writes.

    Raises:
        UserError: the file is missing, unreadable or not a JSON object.
    """
    shown = shown_path(path)
    try:
        with reading(path, f"make it with {made_by}"):
            value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{shown} is not JSON: make it again with {made_by}") from None
    if not isinstance(value, dict):
        raise UserError(f"{shown} is not a JSON object: make it again with {made_by}")
    return value


def rows_path(report: str | Path) -> Path:
    """The rows file that lies beside a report."""
    return Path(report).with_suffix(".rows.jsonl")


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex.

    Raises:
        UserError: it cannot be read.
    """
    with reading(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code_version() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it, when this process first asked; None where git does not know."""
    commit, dirty = _checkout()
    return {"commit": commit, "dirty": dirty}


@cache
def _checkout() -> tuple[str | None, bool | None]:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    code = (str(PACKAGE), f":(exclude){PACKAGE / 'prices.toml'}")  # prices filled in are no change of the code
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return git("rev-parse", "HEAD"), None if changed is None else bool(changed)


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide results; those not installed are left out."""
    return {"python": platform.python_version(), **_packages()}


@cache
def _packages() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores and GPUs; the GPUs only where torch is loaded already (asking would load it)."""
    import sys

    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
