"""A worker's connection to the engine's process: requests in, replies out, many in flight; it comes back when the engine does."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request
from slm_swap.serving.engine import LINE, read_line, request_json, socket_address

AGAIN_SECONDS = 0.2  # until a connection that failed is tried again


class NotNow(Exception):
    """The engine takes no request: "engine_down" or "queue_full"."""


class Link:
    """`changed` is called with the engine's identity when it is there, and with None when it has gone."""

    def __init__(self, folder: Path, changed: Callable[[dict[str, Any] | None], None]):
        self._changed = changed
        self._address = socket_address(folder, os.open(folder, os.O_PATH | os.O_CLOEXEC))
        self._writer: asyncio.StreamWriter | None = None
        self._count = 0
        self._asked: dict[int, asyncio.Future[Reply]] = {}

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        while True:
            with suppress(OSError, ValueError):
                await self._connected()
            await asyncio.sleep(AGAIN_SECONDS)

    async def _connected(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._address, limit=LINE)
        try:
            hello = await reader.readline()
            if not hello:
                return
            self._writer = writer
            self._changed(read_line(hello)["hello"])
            while line := await reader.readline():
                self._told(read_line(line))
        finally:
            was, self._writer = self._writer, None
            writer.close()
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(NotNow("engine_down"))
            self._asked.clear()
            if was:
                self._changed(None)

    def _told(self, told: dict[str, Any]) -> None:
        number = told.pop("reply", None)
        future = self._asked.pop(told.get("full", number), None)
        if future is None or future.done():
            return
        if number is None:
            future.set_exception(NotNow("queue_full"))
        else:
            future.set_result(Reply(**told))

    async def ask(self, request: Request) -> Reply:
        """One reply; cancelled, the engine is told that nobody waits for it.

        Raises:
            NotNow: there will be none.
        """
        if self._writer is None:
            raise NotNow("engine_down")
        self._count += 1
        number, future = self._count, asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self._writer.write(dump_json({"ask": number, "request": request_json(request)}).encode() + b"\n")
        try:
            return await future
        except asyncio.CancelledError:
            if self._asked.pop(number, None) and self._writer is not None:
                self._writer.write(b'{"drop":%d}\n' % number)
            raise
