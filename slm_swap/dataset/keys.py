"""What makes two rows the same: a hash of what a row asks, and one of what it wants."""

from hashlib import sha256
from typing import Any

from slm_swap.rows.lines import dump_json, text_hash

# what stands beside a reply in a row and is neither asked nor wanted
_BESIDE = frozenset(("id", "group", "source", "time", "request", "content", "calls", "object", "completion", "accept", "messages", "tools"))
_KEPT = 4096

Keys = tuple[str, str]
_tools: dict[int, tuple[list, str]] = {}


def record_keys(track: str | None, record: dict[str, Any], messages: list[str] | None = None) -> Keys:
    """(what a row as it is written asks, its tools in any order; what it wants, its calls in any order).

    `messages` are its messages as JSON texts, where they are at hand.

    Raises:
        ValueError: the row cannot be written: it holds NaN, or half of a surrogate pair.
    """
    asked = sha256(f"{track}\n{_tools_key(record.get('tools'))}".encode())
    for text in map(dump_json, record.get("messages") or ()) if messages is None else messages:
        asked.update(b"\n")
        asked.update(text.encode())
    rest = {name: value for name, value in record.items() if name not in _BESIDE}
    asked.update(b"\n" + dump_json(rest).encode())
    wanted = [record.get("object"), record.get("completion"), sorted(map(dump_json, record.get("calls") or ())), record.get("accept")]
    beside = [record.get(name) for name in ("id", "content", "request", "group", "source")]
    "".join(value for value in beside if isinstance(value, str)).encode()
    return asked.hexdigest(), text_hash(dump_json(wanted))


def _tools_key(tools: list[dict] | None) -> str:
    """A hash of the tools in any order; lists that many rows share are looked at once."""
    if not tools:
        return ""
    known = _tools.get(id(tools))
    if known is not None and known[0] is tools:  # the list is kept, so its id is its own
        return known[1]
    if len(_tools) >= _KEPT:
        _tools.clear()
    key = text_hash("\n".join(sorted(map(dump_json, tools))))
    _tools[id(tools)] = tools, key
    return key
