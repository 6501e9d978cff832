"""Python scripts and launchers in processes of their own, which start at once: forks of `fork_server`, which pytest's main process starts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slm_swap.common.settings import ROOT
from tests.support import fork_server

VARIABLE = "SLM_SWAP_FORK_SERVER"  # the server's folder: its socket, its log, and the launchers' stand-ins in bin/
PATIENCE = 240  # seconds that anything may take: for a machine that does many other things


@contextlib.contextmanager
def server() -> Iterator[None]:
    """The fork server, for this process and all that it starts; its packages are loaded with the first request."""
    folder = Path(tempfile.mkdtemp(prefix="slm_swap_"))
    address = str(folder / "socket")
    fork_server.commands(folder / "bin", address)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONUNBUFFERED")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, (folder / "log").open("w") as log:
        listener.bind(address)
        listener.listen(64)
        words = [sys.executable, fork_server.__file__, "serve", str(listener.fileno())]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()], env=environment, cwd=ROOT
        )
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        process.communicate()  # the end of its input is its end
        shutil.rmtree(folder)


def commands_path() -> str:
    """A PATH on which `python`, `torchrun` and `accelerate` fork: for a launcher or a wrapper."""
    return os.pathsep.join([f"{os.environ[VARIABLE]}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])


def environment(**changes: str) -> dict[str, str]:
    """What a script sees: of this machine's own settings of Langfuse and Azure nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "LANGFUSE_"))}
    return kept | changes


class Script:
    """As `subprocess.Popen([sys.executable, *words])` with both outputs captured, or at the end of the file `log`.

    `returncode`, `poll`, `wait`, `communicate`, `send_signal` and `kill` are those of Popen; `pid` is the script's own.
    """

    def __init__(self, *words: object, log: Path | None = None, folder: Path = ROOT, **changes: str):
        self.args, self.returncode, self._outputs = [str(word) for word in words], None, []
        with contextlib.ExitStack() as stack:
            nothing = stack.enter_context(open(os.devnull))
            if log:
                files = [nothing, both := stack.enter_context(log.open("a")), both]
            else:
                self._outputs = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115  closed by communicate
                files = [nothing, *self._outputs]
            address = f"{os.environ[VARIABLE]}/socket"
            numbers = [file.fileno() for file in files]
            self._connection, self.pid = fork_server.ask(address, self.args, environment(**changes), str(folder), numbers)

    def __del__(self):
        """Nobody waits for it any more: the server kills it."""
        for thing in (self._connection, *self._outputs):
            thing.close()

    def wait(self, timeout: float = PATIENCE) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = fork_server.told(self._connection)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            fork_server.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for stream in self._outputs:
            with stream:
                stream.seek(0)
                said.append(stream.read())
        return said[0], said[1]


def run_python(*words: object, **options) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *words], capture_output=True)`; options are those of Script."""
    script = Script(*words, **options)
    said, error = script.communicate()
    return subprocess.CompletedProcess(script.args, script.returncode, said, error)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def children_of(parent: int) -> list[int]:
    """The Python processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            told = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if told["PPid"] == str(parent) and told["Name"].startswith("python"):
                found.append(int(status.parent.name))
    return found
