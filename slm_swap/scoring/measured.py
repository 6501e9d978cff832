"""Which rows say nothing of a model, because the set-up kept it from answering: a verdict must not rest on them."""

from collections.abc import Mapping
from typing import Any

ROOM = 4  # times the reference's tokens: a small model that has not stopped by then was not cut short by the limit


def unmeasured(row: Mapping[str, Any], hosted: bool) -> str | None:
    """Why a row of a rows file is not measured: "failed", "truncated", or None where it is.

    A failed request says nothing of a model. A reply that our own limit on new tokens cut, and that misses, might have been right
    with a larger one: of a hosted model always, as production would not cut it; of the small model where its thinking was cut or
    the limit leaves less than ROOM times the reference's tokens. `row["cut"]` says what is known of it (`limit`,
    `reference_tokens`, `thinking`); what is not known is not held against either model. A cut reply that is right because it had made no
    call, where none is due, might have made one behind the cut.
    """
    if row.get("finish_reason") == "error":
        return "failed"
    if row.get("finish_reason") != "length" or (row.get("error") is None and not _talked(row)):
        return None
    cut = row.get("cut") or {}
    limit, wanted = cut.get("limit"), cut.get("reference_tokens")
    if not hosted and not cut.get("thinking") and limit is not None and wanted is not None and limit >= ROOM * wanted:
        return None
    return "truncated"


def _talked(row: Mapping[str, Any]) -> bool:
    """Whether a reply is right because it makes no call."""
    return row.get("tool") is None and bool((row.get("scores") or {}).get("decision_match"))
