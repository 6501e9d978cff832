"""Parts of a benchmark in processes of their own, so that one part's memory, imports or failure are not another's."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path


def in_own_process(script: str, flags: list[str], limit: float, log: Path, processes: int = 1) -> str | None:
    """Run a script with nothing of this process, for `limit` seconds at most; what went wrong in one line, or None. Several are torchrun's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, *launcher, script, *flags], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                child.terminate()  # a launcher ends its processes then
                try:
                    child.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
    if code == 0:
        return None
    if code is None:
        return f"no result after {limit:g} s"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*[Ee]rror\b", line) and "ChildFailedError" not in line]  # the launcher's own
    causes = [line for line in errors if "has ended (what it said stands above)" not in line]
    return (causes or errors or lines or [f"exit code {code}"])[-1][:300]
