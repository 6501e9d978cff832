"""One replica of the local model per process: rank 0 deals the rows out, takes the replies, and does everything else alone.

The processes are those of `accelerate launch` or `torchrun`, on one machine or several. Rank 0 listens where MASTER_ADDR points and
tells the others its port and a key of this run through the launcher's own store; rows and replies then go over one connection for
each rank. Row i goes to rank i modulo their number, so that a run that was interrupted goes on with the batches it would have had.
"""

import ctypes
import os
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as connect_to
from multiprocessing.connection import Connection, Listener, Pipe, wait
from typing import Any, NoReturn

from slm_swap.clients import Client, Reply
from slm_swap.errors import UserError
from slm_swap.prompts import Messages
from slm_swap.settings import Launch

AHEAD = 4096  # rows dealt to a rank that its engine has not taken yet
TAKEN = 256  # rows after which a rank says that its engine has taken them


def take_one_gpu(launch: Launch) -> None:
    """Let this process see its own GPU alone, the one of its local rank. Must come before CUDA is first asked anything."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else []
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(launch.local_rank)
    elif visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[launch.local_rank] if launch.local_rank < len(gpus) else ""


def _store() -> Any:
    """The launcher's key-value store."""
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore("slm_swap", store)


def open_replicas(launch: Launch, workload: Any, make: Callable[[Any], Client]) -> "Replicas":
    """Rank 0's part: its own replica and the connections to the others, who build theirs at the same time."""
    key, store = secrets.token_bytes(32), _store()
    # On one machine only it can connect; over several, rank 0's own name may stand for its loopback.
    host = launch.master if launch.master in ("127.0.0.1", "localhost") else ""
    with Listener((host, 0), backlog=launch.world, authkey=key) as listener:
        store.set("key", key)
        store.set("port", str(listener.address[1]))
        connections = {}
        while len(connections) < launch.world - 1:
            with suppress(AuthenticationError, EOFError, OSError):  # somebody else's connection
                connection = listener.accept()
                connections[connection.recv()] = connection
    for connection in connections.values():
        connection.send(workload)
    return Replicas(make(workload), [connections[rank] for rank in sorted(connections)])


def serve(launch: Launch, make: Callable[[Any], Client]) -> None:
    """What the other ranks do until rank 0 is done. What goes wrong is told by rank 0."""
    store = _store()
    with connect_to((launch.master, int(store.get("port"))), authkey=store.get("key")) as connection:
        connection.send(launch.rank)
        with suppress(EOFError, ConnectionError):  # rank 0 has ended, in whatever way
            try:
                client = make(connection.recv())
            except UserError as error:
                fail(error, connection, connection.recv)
            connection.send((client.load_seconds, client.identity))
            answer(client, connection)


def fail(error: UserError, connection: Connection, receive: Callable[[], Any]) -> NoReturn:
    """Send what went wrong, and wait until rank 0 has ended: EOFError or ConnectionError.

    A launcher ends all ranks as soon as one fails: rank 0, which is the one to fail, would not come to tell of it.
    """
    connection.send(error)
    while True:
        receive()


def what_counts(identity: dict[str, Any]) -> dict[str, Any]:
    """What all ranks must have alike: the files' contents, not where they lie, and the kind of device, not its number."""
    return {name: told for name, told in identity.items() if name not in ("path", "adapter")} | {"device": identity["device"].split(":")[0]}


def answer(client: Client, connection: Connection) -> None:
    """Answer rows that come as (index, messages, whether it is answered), up to a None, and again until the connection ends.

    A state in place of a first row is restored.

    Raises:
        EOFError, ConnectionError: the connection has ended.
    """
    coming: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:  # a thread of its own: rank 0 must never wait until this one has read
        try:
            while True:
                coming.put(connection.recv())
        except (EOFError, OSError):
            coming.put(EOFError)

    def take() -> Any:
        row = coming.get()
        if row is EOFError:
            raise EOFError
        return row

    def rows(row: Any, answered: set[int]) -> Iterator[tuple[int, Messages]]:
        taken = 0
        while row is not None:
            index, messages, done = row
            if done:
                answered.add(index)
            taken += 1
            if taken % TAKEN == 0:
                connection.send(TAKEN)
            yield index, messages
            row = take()

    threading.Thread(target=receive, daemon=True).start()
    try:
        while True:
            if isinstance(first := take(), dict):
                client.restore(first)
                continue
            answered: set[int] = set()
            for index, reply in client.stream(rows(first, answered), answered):
                connection.send((index, reply))
            connection.send(client.state())
    except UserError as error:
        fail(error, connection, take)


class Replicas:
    """The local model on several GPUs behind the client protocol; `local` is this process's replica.

    Raises:
        UserError: a rank could not load the model, or has another one, or no GPU where this one has; in `stream`: a rank ended early.
    """

    kind = "slm"

    def __init__(self, local: Client, others: list[Connection]):
        self.local, self._others, self._halved = local, others, 0
        self._working: tuple[Connection, threading.Thread] | None = None  # the local replica's rows and replies, and its thread
        self.load_seconds = local.load_seconds
        for rank, connection in enumerate(others, 1):
            seconds, identity = self._receive(rank, connection)
            self.load_seconds = max(self.load_seconds, seconds)
            here, there = (what_counts(told) for told in (local.identity, identity))
            if here.pop("device") != (device := there.pop("device")):
                raise UserError(f"rank {rank} runs on {device} and rank 0 does not: launch no more processes than there are GPUs")
            if differ := [name for name in here | there if here.get(name) != there.get(name)]:
                raise UserError(f"rank {rank} has another model than rank 0 ({', '.join(differ)}): give all machines the same files and packages")

    @staticmethod
    def _receive(rank: int, connection: Connection) -> Any:
        try:
            told = connection.recv()
        except (EOFError, OSError):
            raise UserError(f"rank {rank} has ended (what it said stands above): run the same command again to go on") from None
        if isinstance(told, UserError):
            raise UserError(f"rank {rank}: {told}")
        return told

    def generate(self, batch: list[Messages]) -> list[Reply]:
        replies = dict(self.stream(enumerate(batch)))
        return [replies[index] for index in range(len(batch))]

    def stream(self, rows: Iterable[tuple[int, Messages]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        here, there = Pipe()

        def work() -> None:
            with there, suppress(EOFError, ConnectionError):
                answer(self.local, there)

        thread = threading.Thread(target=work, name="replica", daemon=True)
        self._working = here, thread
        thread.start()
        connections = [here, *self._others]
        ranks = {connection: rank for rank, connection in enumerate(connections)}
        dealt: Counter[int] = Counter()
        places, row, busy = enumerate(rows), None, set(connections)
        with here:
            while busy:
                while row is not EOFError:
                    row = row or next(places, None)
                    if row is None:
                        row = EOFError
                        for rank, connection in enumerate(connections):
                            self._send(rank, connection, None)
                        break
                    place, (index, messages) = row
                    rank = place % len(connections)
                    if dealt[rank] >= AHEAD:
                        break
                    self._send(rank, connections[rank], (index, messages, index in answered))
                    dealt[rank] += 1
                    row = None
                for connection in wait(busy):
                    rank = ranks[connection]
                    told = self._receive(rank, connection)
                    if isinstance(told, dict):
                        busy.discard(connection)
                        self._halved += told.get("batches_halved", 0) if rank else 0
                    elif isinstance(told, int):
                        dealt[rank] -= told
                    else:
                        index, reply = told
                        yield index, replace(reply, batch=reply.batch and f"{rank}.{reply.batch}")

    def _send(self, rank: int, connection: Connection, row: Any) -> None:
        try:
            connection.send(row)
        except OSError:
            self._receive(rank, connection)  # says why
            raise

    @property
    def identity(self) -> dict[str, Any]:
        return self.local.identity

    def state(self) -> dict[str, Any]:
        told = self.local.state()
        return told | ({"batches_halved": told["batches_halved"] + self._halved} if "batches_halved" in told else {})

    def restore(self, state: dict[str, Any]) -> None:
        self.local.restore(state)
        for rank, connection in enumerate(self._others, 1):
            self._send(rank, connection, state | ({"batches_halved": 0} if "batches_halved" in state else {}))

    def describe(self) -> dict[str, Any]:
        return self.local.describe() | self.state()

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        return self.local.cost(input_tokens, cached_tokens, output_tokens, seconds)

    def close(self) -> None:
        """Let the other ranks end, and this one's replica, in whatever it is."""
        for connection in self._others:
            connection.close()
        if self._working:
            connection, thread = self._working
            connection.close()
            # A thread that is still in torch when the interpreter ends aborts the process, and a batch may take a minute in the
            # documented setting: the exception comes up in that thread.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
            thread.join()
        self.local.close()
