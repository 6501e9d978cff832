"""A server that starts Python scripts as forks of itself, with the heavy packages loaded: torch, transformers and TRL take 12 CPU seconds to import.

    python fork_server.py serve FD          the server, on a listening socket that it inherits; it ends when its standard input does
    python fork_server.py run SOCKET ...    as `python ...`, in a fork: what the `python`, `torchrun` and `accelerate` of `commands` do

A fork has the arguments, environment, folder and files of whoever asked for it, and `sys.executable` is the `python` above, so that real launchers
start their ranks here too. Two things differ from a new interpreter: packages have read their environment variables already, and the end
is `atexit` and flushing, without the interpreter's own unwinding (half a second for these packages) unless FORK_UNWINDS is set.
Anything but `[-u] SCRIPT ...` and `[-u] -m MODULE ...` is given to a new interpreter. So is everything where there is an NVIDIA
GPU, since CUDA does not survive a fork.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

PRELOADED = (
    "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "openai", "langfuse", "scipy.stats", "torch.distributed.run", "accelerate.commands.accelerate_cli",
)  # fmt: skip
LAZY = {"transformers": ("AutoModelForCausalLM", "AutoTokenizer", "Trainer"), "trl": ("SFTConfig", "SFTTrainer")}  # imported when they are asked for
LARGEST = 200_000  # bytes of a request
LAUNCHERS = {"python": (), "torchrun": ("-m", "torch.distributed.run"), "accelerate": ("-m", "accelerate.commands.accelerate_cli")}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMAND = '#!/bin/sh\nexec "{python}" -IS "{here}" run "{address}" {words} "$@"\n'


def commands(folder: Path, address: str) -> None:
    """Write the launchers' stand-ins into a folder."""
    folder.mkdir()
    for name, words in LAUNCHERS.items():
        text = COMMAND.format(python=sys.executable, here=Path(__file__).resolve(), address=address, words=" ".join(words))
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def ask(address: str, words: list[str], environment: dict[str, str], folder: str, files: list[int]) -> tuple[socket.socket, int]:
    """Start `python WORDS` with three files: the connection that tells its end (and whose end is its end), and its process id."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    request = json.dumps({"words": words, "environment": environment, "folder": folder, "deaf": deaf}).encode()
    socket.send_fds(connection, [request], files)
    return connection, told(connection)


def told(connection: socket.socket) -> int:
    """The server's next word: a process id, then an exit code as subprocess has it."""
    word = connection.recv(64)
    if not word:
        raise RuntimeError("the fork server has ended")
    return int(word)


def stand_in(address: str, words: list[str]) -> None:
    """Be as good as the fork: signals go to it, and its end is this one's. What no fork can do is done by a new interpreter, in this process."""
    if not forks(words):
        os.execv(sys.executable, [sys.executable, *words])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    connection, child = ask(address, words, dict(os.environ), os.getcwd(), [0, 1, 2])
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = told(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def kill(child: int, number: int) -> None:
    """Send a signal to a process that may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(child, number)


class Server:
    """Forks for requests, tells their ends, and kills those that nobody waits for any more."""

    def __init__(self, listener: socket.socket):
        import selectors

        self.listener, self.selector, self.loaded = listener, selectors.DefaultSelector(), False
        self.listening = selectors.EVENT_READ
        self.children: dict[int, tuple[int, socket.socket]] = {}  # by process id: its pidfd and who asked for it
        for source in (sys.stdin.fileno(), listener):
            self.selector.register(source, self.listening)

    def serve(self) -> dict | None:
        """The request, in a fork that is to do it; None in the server, at its end."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if request := self.fork():
                        return request
                elif key.data is not None:
                    self.end(key.data, killed=key.fileobj is not self.children[key.data][0])
                    break  # the other source of this child may be among the events
                else:
                    for child in list(self.children):
                        self.end(child, killed=True)
                    return None

    def fork(self) -> dict | None:
        connection, _ = self.listener.accept()
        text, files, _, _ = socket.recv_fds(connection, LARGEST, 3)
        if not text:
            connection.close()
            return None
        if not self.loaded and forks(json.loads(text)["words"]):
            self.loaded = load()
        child = os.fork()
        if not child:
            self.close()
            connection.close()
            return json.loads(text) | {"files": files}
        for file in files:
            os.close(file)
        with suppress(OSError):
            connection.send(str(child).encode())
        self.children[child] = (os.pidfd_open(child), connection)
        for source in self.children[child]:
            self.selector.register(source, self.listening, child)
        return None

    def end(self, child: int, killed: bool) -> None:
        pidfd, connection = self.children.pop(child)
        if killed:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with suppress(OSError):  # nobody waits for it any more
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        for source in (pidfd, connection):
            self.selector.unregister(source)
        os.close(pidfd)
        connection.close()

    def close(self) -> None:
        """Let go of all that a fork has of the server's."""
        self.selector.close()
        self.listener.close()
        for pidfd, connection in self.children.values():
            os.close(pidfd)
            connection.close()


def forks(words: list[str]) -> bool:
    """Whether a fork can do `python WORDS`."""
    rest = words[words[:1] == ["-u"] :]
    return bool(rest) and (rest[0] == "-m" or not rest[0].startswith("-")) and not Path("/dev/nvidiactl").exists()


def load() -> bool:
    """Import the heavy packages, once; whether they are."""
    import gc
    import importlib

    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    for name, attributes in LAZY.items():
        with suppress(ImportError):
            for attribute in attributes:
                getattr(importlib.import_module(name), attribute)
    gc.collect()
    gc.freeze()  # or each fork copies all of it as its own collections look at it
    return True


def become(request: dict, address: str) -> None:
    """Run the request's command as if this process had been started for it; never comes back."""
    os.setpgid(0, 0)
    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.SIG_IGN if request["deaf"] else signal.default_int_handler)
    words = request["words"]
    if not forks(words):
        os.execv(sys.executable, [sys.executable, *words])
    options = words[: words[0] == "-u"]
    rest = words[len(options) :]
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        unbuffered = bool(options or os.environ.get("PYTHONUNBUFFERED") or os.isatty(number) or number == 2)
        stream.reconfigure(line_buffering=unbuffered, write_through=unbuffered)
    sys.executable = str(Path(address).with_name("bin") / "python")
    as_module = rest[0] == "-m"
    folder = os.getcwd() if as_module else str(Path(rest[0]).resolve().parent)
    sys.path[:0] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = rest[1:] if as_module else rest
    import runpy

    try:
        if as_module:
            sys.modules.pop(rest[1], None)  # it runs anew
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(rest[0]), run_name="__main__")
        code = 0
    except BaseException as error:
        if os.environ.get("FORK_UNWINDS"):
            raise
        code = exit_code(error)
    if not os.environ.get("FORK_UNWINDS"):
        end(code)


def exit_code(error: BaseException) -> int:
    """What the interpreter makes of what a script ended with: says it on standard error, and the exit code."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def end(code: int) -> None:
    """What the interpreter does at its end, but for freeing everything: that copies most of the server's memory first."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        stand_in(sys.argv[2], sys.argv[3:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end ends this
    del sys.path[0]  # this folder
    LISTENER = socket.socket(fileno=int(sys.argv[2]))
    ADDRESS = LISTENER.getsockname()
    if asked := Server(LISTENER).serve():
        become(asked, ADDRESS)
