"""Replies kept for later runs, by what they depend on: the model's identity with its parameters, and the messages.

One SQLite file in the cache's folder, which several processes of one machine may use at once; measured, an entry costs a fifth of
what a file of its own costs to write and to read. Write-ahead logging wants a local disk. An entry begins with the CRC-32 of its key and
of what follows: one that does not match it was damaged, and is a miss.
"""

import hashlib
import json
import sqlite3
import zlib
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.os_errors import writing
from slm_swap.common.settings import shown_path
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request

KEPT = ("stop", "length")  # a filter, a refusal or a failure may be another one tomorrow
ANOTHER = "choose another --cache"
ADVICE = {  # by the primary result code
    **dict.fromkeys((sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR), "make room and run the same command again"),
    **dict.fromkeys((sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM), ANOTHER),
}
WAIT_SECONDS = 60.0  # for another process's write


class ReplyCache:
    """The replies of one model; `identity` is `protocol.Client.identity`.

    `damaged` counts the entries that were found and could not be used.

    Raises:
        UserError: the folder cannot be made or written, or holds another kind of file by that name.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]):
        self.path = Path(folder) / "replies.sqlite3"
        self._identity, self.damaged = identity, 0
        with writing(folder, ANOTHER):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        self._database.text_factory = lambda text: text.decode("utf-8", "replace")  # damage may be no text at all
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")  # a power cut may cost the last entries, never the file
        self._run("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")

    def get(self, request: Request) -> tuple[Reply, float] | None:
        """(reply, seconds that it took of the run that asked for it), None where the model was not asked that before."""
        key = self._key(request)
        found = self._run("SELECT reply FROM replies WHERE key = ?", key).fetchone()
        if found is None:
            return None
        checksum, told = str(found[0])[:8], str(found[0])[8:]
        if checksum != _checksum(key, told):
            self.damaged += 1
            return None
        told = json.loads(told)
        return Reply(**told["reply"]), told["spent"]

    def put(self, request: Request, reply: Reply, spent: float) -> None:
        """Keep a reply, if it is one that may be kept."""
        if reply.finish_reason in KEPT and reply.error is None:
            key, told = self._key(request), dump_json({"reply": vars(reply) | {"batch": None}, "spent": round(spent, 6)})
            self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, _checksum(key, told) + told)

    def _key(self, request: Request) -> bytes:
        asked = [self._identity, request.key(), *([request.wanted] if "constrain" in self._identity else [])]
        text = json.dumps(asked, sort_keys=True, cls=ExactEncoder)
        return hashlib.sha256(text.encode()).digest()

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: sqlite3.Error) -> UserError:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        return UserError(f"{shown_path(self.path)} cannot be used ({error}): {ADVICE.get(code, f'move it away, or {ANOTHER}')}")

    def close(self) -> None:
        self._database.close()


def _checksum(key: bytes, told: str) -> str:
    return f"{zlib.crc32(told.encode('utf-8', 'surrogatepass'), zlib.crc32(key)):08x}"
