"""What an endpoint is started with."""

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path

from slm_swap.clients.pricing import Prices
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings, shown_path
from slm_swap.evaluating.recipe import Recipe
from slm_swap.rows.few_shot import FewShot
from slm_swap.tracing.runs import Tracing
from slm_swap.verdict.cascade import Cascade

MODES = ("hosted", "shadow", "cascade", "local")
SHORTEST_KEY = 16


@dataclass(frozen=True)
class Options:
    """`ask`, `few_shot`, `constrain` and `max_new_tokens` are how the small model is asked, as in evaluations. `few_shot` holds the rows themselves: a worker that is
    started again has those that were hashed at the start, whatever has become of their file; so with `prices`, by which all workers count. `deadline` in seconds is the longest that a request waits for the
    small model, `queue` how many of all workers wait; `timeout` in seconds is how long the hosted model may be silent.

    `max_body` in bytes and `body_seconds` bound a request's body. `audit_share` of the locally answered requests is asked of the hosted
    model, too, within `audit_budget` a day (None: no bound). `plain_json`: all requests ask for JSON, also without response_format.
    """

    settings: Settings = field(repr=False)
    mode: str
    track: str
    state: Path
    cascade: Cascade | None = None
    recipe: Recipe | None = None
    ask: str | None = None
    few_shot: FewShot | None = None
    constrain: str = "off"
    max_new_tokens: int = 256
    deadline: float = 10.0
    queue: int = 64
    timeout: float = 600.0
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)
    max_body: int = 16 * 2**20
    body_seconds: float = 30.0
    audit_share: float = 0.02
    audit_budget: float | None = None
    prices: Prices = field(default_factory=lambda: Prices(""))
    audit_content: bool = True
    plain_json: bool = False
    log_content: bool = False
    tracing: Tracing | None = None
    workers: int = 1
    minute: float = 60.0

    def __post_init__(self):
        if self.recipe:
            _ = self.recipe.sha256  # read now, not by a worker that is started again when the file may be another one, or gone

    @property
    def small(self) -> bool:
        """Whether the small model is asked at all."""
        return self.mode != "hosted"

    def knows(self, presented: str | None) -> bool:
        """Whether a key is a client's; every one is looked at, so that the time that it takes says nothing."""
        digest = key_digest(presented or "")
        found = False
        for known in self.keys:
            found |= hmac.compare_digest(known, digest)
        return found


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def read_keys(settings: Settings, path: Path | None) -> frozenset[bytes]:
    """The clients' keys: those of SLM_SWAP_KEYS, with commas between, and those of a file, one a line. Only their hashes are kept.

    Raises:
        UserError: the file cannot be read, a key is too short to be one, has characters that no client can send, or is one of the keys that this endpoint itself uses.
    """
    found = [key.strip() for key in (settings.swap_keys or "").split(",")]
    if path is not None:
        try:
            found += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the keys of {shown_path(path)} ({type(error).__name__}): check --keys") from None
        if not any(found):
            raise UserError(f"{shown_path(path)} has no key: write one a line")
    found = [key for key in found if key]
    if any(len(key) < SHORTEST_KEY for key in found):
        raise UserError(f"a client's key has fewer than {SHORTEST_KEY} characters: make longer ones, such as by `openssl rand -hex 32`")
    if not all(re.fullmatch(r"[!-~]+", key) for key in found):  # a bearer token has no spaces, and clients write other letters each in its own way
        raise UserError("a client's key has spaces or letters beyond ASCII, with which it would never be known: make others, such as by `openssl rand -hex 32`")
    if set(found) & set(settings.secrets):
        raise UserError("a client's key is one of the keys that this endpoint uses itself: give clients keys of their own")
    return frozenset(map(key_digest, found))
