"""One replica of the local model per GPU, each in a process of its own, and one process that deals the rows out and does all the rest.

The processes are those of `accelerate launch` or `torchrun`, on one machine or several; rank 0 forks its replica, so that what it does
for every row keeps no GPU waiting. The others find it where MASTER_ADDR points, by a port and a key of this run that are in the
launcher's own store. Row i goes to rank i modulo their number, so that a run that was interrupted goes on with the batches it would
have had.
"""

import ctypes
import os
import queue
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as connect_to
from multiprocessing.connection import Connection, Listener, Pipe, wait
from typing import Any, NoReturn

from slm_swap.clients.engines import Workload
from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Launch
from slm_swap.rows.prompts import Request

AHEAD = 4096  # rows dealt to a rank that its engine has not taken yet
TAKEN = 256  # rows after which a rank says that its engine has taken them
DEALT = 64  # rows that are sent to a rank at once, where there are as many
PATIENCE = 300  # seconds that rank 0 has to look at the rows, and the others to connect: a launcher knows of one machine's failures only
FORGET = "forget"  # what is sent to a rank for Client.forget
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def take_one_gpu(launch: Launch) -> None:
    """Let this process see its own GPU alone, the one of its local rank. Must come before CUDA is first asked anything."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else []
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(launch.local_rank)
    elif visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[launch.local_rank] if launch.local_rank < len(gpus) else ""


def fork_replica(launch: Launch) -> Launch:
    """Rank 0's launch with its replica's process, which it is forked into; in that process, and in other ranks, one that serves.

    Must come before torch, whose state no fork survives, and before anything is opened. The replica ends with rank 0, however that does.
    """
    if launch.rank:
        return replace(launch, serves=True)
    here, there = Pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        there.close()
        return replace(launch, replica=here, replica_pid=child)
    here.close()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides on what Ctrl-C means
    if os.getppid() != parent:
        os._exit(0)
    return replace(launch, replica=there, serves=True)


def _store() -> Any:
    """The launcher's key-value store."""
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=PATIENCE))))
    return PrefixStore("slm_swap", store)


def open_replicas(
    launch: Launch, workload: Workload | None, cost: Callable[[float], float | None], count: Callable[[str], int]
) -> "Replicas":
    """Rank 0's part: the connections to all replicas, which are built at the same time. `cost` is that of some seconds, `count` gives
    a text's tokens.

    Raises:
        UserError: a rank does not come, or as `Replicas`.
    """
    key, store = secrets.token_bytes(32), _store()
    if workload:
        workload = replace(workload, rows=-(-workload.rows // launch.world))
    with suppress(OSError):  # it has ended: Replicas says so
        launch.replica.send(workload)
    connections = {0: launch.replica}

    def admit() -> None:
        while len(connections) < launch.world:
            with suppress(AuthenticationError, EOFError, OSError):  # somebody else's connection
                connection = listener.accept()
                connections[connection.recv()] = connection
                connection.send(workload)

    # On one machine only it can connect; over several, rank 0's own name may stand for its loopback.
    host = launch.master if launch.master in ("127.0.0.1", "localhost") else ""
    with Listener((host, 0), backlog=launch.world, authkey=key) as listener:
        store.set("key", key)
        store.set("port", str(listener.address[1]))
        admission = threading.Thread(target=admit, daemon=True)
        admission.start()
        admission.join(PATIENCE)
    if admission.is_alive():
        missing = ", ".join(str(rank) for rank in range(launch.world) if rank not in connections)
        raise UserError(f"not connected within {PATIENCE} s: rank {missing}: see what is said on its machine, and let it reach this one's ports")
    return Replicas([connections[rank] for rank in sorted(connections)], cost, launch.replica_pid, count)


def serve(launch: Launch, make: Callable[[Callable[[], Workload | None]], Client]) -> None:
    """What a replica's process does until rank 0 is done; `make` is given how to receive the workload. Rank 0 tells what goes wrong.

    Raises:
        UserError: there is no rank 0 to tell it.
    """
    if connection := launch.replica:
        _serve(connection, make)
        return
    try:
        store = _store()
        connection = connect_to((launch.master, int(store.get("port"))), authkey=store.get("key"))
    except (RuntimeError, OSError, EOFError, AuthenticationError):  # torch's are RuntimeErrors
        raise UserError(f"rank 0 is not to be reached at {launch.master}: see what it said there, and let its ports be reached from here") from None
    with connection:
        connection.send(launch.rank)
        _serve(connection, make)


def _serve(connection: Connection, make: Callable) -> None:
    with suppress(EOFError, ConnectionError):  # rank 0 has ended, in whatever way
        try:
            client = make(connection.recv)
        except UserError as error:
            fail(error, connection, connection.recv)
        connection.send(about(client))
        answer(client, connection)


def about(client: Client) -> tuple[float, dict[str, Any], dict[str, Any], dict[str, Any], str | None]:
    """What a replica tells first."""
    return client.load_seconds, client.identity, client.state(), client.trained, client.warning


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
    """Answer rows that come as lists of (index, request, whether it is answered), up to a None, and again until the connection ends.

    A state in place of a first row is restored, and told as it is then. FORGET in its place makes the client forget. Sent are (index, reply), before them the state where it has
    changed, the number of rows that were taken, and a None at the end.

    Raises:
        EOFError, ConnectionError: the connection has ended.
    """
    coming: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:  # a thread of its own: rank 0 must never wait until this one has read
        try:
            while True:
                told = connection.recv()
                for row in told if isinstance(told, list) else [told]:
                    coming.put(row)
        except (EOFError, OSError):
            coming.put(EOFError)

    def take() -> Any:
        row = coming.get()
        if row is EOFError:
            raise EOFError
        return row

    def rows(row: Any, answered: set[int]) -> Iterator[tuple[int, Request]]:
        taken = 0
        while row is not None:
            index, request, done = row
            if done:
                answered.add(index)
            taken += 1
            if taken % TAKEN == 0:
                connection.send(TAKEN)
            yield index, request
            row = take()

    def tell(state: dict[str, Any]) -> dict[str, Any]:
        if (now := client.state()) != state:
            connection.send(now)
        return now

    threading.Thread(target=receive, daemon=True).start()
    try:
        state = client.state()
        while True:
            if isinstance(first := take(), dict):
                client.restore(first)
                connection.send(state := client.state())
                continue
            if first == FORGET:
                client.forget()
                continue
            answered: set[int] = set()
            for index, reply in client.stream(rows(first, answered), answered):
                state = tell(state)
                connection.send((index, reply))
            state = tell(state)
            connection.send(None)
    except UserError as error:
        fail(error, connection, take)


class Replicas:
    """The local model on several GPUs behind the client protocol; `connections` are to the replicas, by rank.

    Raises:
        UserError: a rank could not load the model, or has another one, or no GPU where rank 0 has one; in `stream`: a replica ended early.
    """

    kind = "slm"

    def __init__(
        self,
        connections: list[Connection],
        cost: Callable[[float], float | None],
        own: int | None = None,
        count: Callable[[str], int | None] = lambda text: None,
    ):
        self._connections, self._cost, self._own, self._count = connections, cost, own, count
        told = [self._receive(rank) for rank in range(len(connections))]
        self.load_seconds = max(seconds for seconds, *_ in told)
        _, self.identity, _, self.trained, self.warning = told[0]
        self._states = [state for _, _, state, *_ in told]
        for rank, (_, identity, *_) in enumerate(told):
            here, there = (what_counts(one) for one in (self.identity, identity))
            if here.pop("device") != (device := there.pop("device")):
                raise UserError(f"rank {rank} runs on {device} and rank 0 does not: launch no more processes than there are GPUs")
            if differ := [name for name in here | there if here.get(name) != there.get(name)]:
                raise UserError(f"rank {rank} has another model than rank 0 ({', '.join(differ)}): give all machines the same files and packages")

    def _receive(self, rank: int) -> Any:
        try:
            told = self._connections[rank].recv()
        except (EOFError, OSError):
            raise UserError(f"rank {rank} has ended (what it said stands above): run the same command again to go on") from None
        if isinstance(told, UserError):
            raise UserError(f"rank {rank}: {told}" if rank else str(told))
        return told

    def _send(self, rank: int, told: Any) -> None:
        try:
            self._connections[rank].send(told)
        except OSError:
            while True:  # what it has sent before it ended, then why
                self._receive(rank)

    def generate(self, batch: list[Request]) -> list[Reply]:
        replies = dict(self.stream(enumerate(batch)))
        return [replies[index] for index in range(len(batch))]

    def stream(self, rows: Iterable[tuple[int, Request]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        busy, places, ahead = set(self._connections), enumerate(rows), Counter[int]()
        hands: list[list] = [[] for _ in ranks]  # what each rank is dealt next
        row: Any = None
        while busy:
            while row is not EOFError:
                row = row or next(places, EOFError)
                if row is EOFError:
                    for hand in hands:
                        hand.append(None)
                    break
                place, (index, request) = row
                rank = place % len(hands)
                if ahead[rank] >= AHEAD:
                    break
                ahead[rank] += 1
                hands[rank].append((index, request, index in answered))
                row = None
                if len(hands[rank]) == DEALT:
                    self._send(rank, hands[rank])
                    hands[rank] = []
            for rank, hand in enumerate(hands):
                if hand:
                    self._send(rank, hand)
                    hands[rank] = []
            for connection in wait(busy):
                rank = ranks[connection]
                told = self._receive(rank)
                if told is None:
                    busy.discard(connection)
                elif isinstance(told, dict):
                    self._states[rank] = told
                elif isinstance(told, int):
                    ahead[rank] -= told
                else:
                    index, reply = told
                    yield index, replace(reply, batch=reply.batch and f"{rank}.{reply.batch}")

    def state(self) -> dict[str, Any]:
        halved = [state["batches_halved"] for state in self._states if "batches_halved" in state]
        failed = next(({"capture_error": state["capture_error"]} for state in self._states if "capture_error" in state), {})
        return self._states[0] | ({"batches_halved": sum(halved)} if halved else {}) | failed

    def restore(self, state: dict[str, Any]) -> None:
        for rank in range(len(self._connections)):
            self._send(rank, state | ({"batches_halved": 0} if rank and "batches_halved" in state else {}))
            self._states[rank] = self._receive(rank)

    def count_tokens(self, text: str) -> int | None:
        return self._count(text)

    def forget(self) -> None:
        for rank in range(len(self._connections)):
            self._send(rank, FORGET)

    def describe(self) -> dict[str, Any]:
        return self.identity | self.trained | self.state()

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        return self._cost(seconds)

    def close(self) -> None:
        """Let the replicas end, the own one in whatever it is: a batch may take a minute in the documented setting."""
        for connection in self._connections:
            connection.close()
        if self._own:
            with suppress(ProcessLookupError, ChildProcessError):  # gone, and nobody's child, where SIGCHLD is ignored
                os.kill(self._own, signal.SIGKILL)
                os.waitpid(self._own, 0)
