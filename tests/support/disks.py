"""Disks that run full: tmpfs of a size, where the machine lets one be mounted."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A mounted tmpfs; `leave` fills it but for some KiB, `make_room` takes that away again."""

    def __init__(self, folder: Path):
        self.folder, self._ballast = folder, folder / "ballast"

    def leave(self, kib: int) -> None:
        self.make_room()
        told = os.statvfs(self.folder)
        self._ballast.write_bytes(bytes(max(0, told.f_bavail * told.f_frsize - kib * 1024)))

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def files(self) -> dict[str, int]:
        """The size of each file by its path."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and path != self._ballast)
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in found}


@contextmanager
def mounted(folder: Path, mib: int) -> Iterator[Disk]:
    """A disk at a new folder; the test is skipped where it may not be mounted."""
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
