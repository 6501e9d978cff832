"""The checks of gold that hold for every source: tools on offer, arguments and values against their schemas, acceptable values."""

from typing import Any

from referencing.exceptions import Unresolvable

from slm_swap.dataset.row import Unusable
from slm_swap.rows.json_schema import call_violations, violations
from slm_swap.rows.schema_parts import is_open, lists_property


def check_calls(calls: list[dict], tools: list[dict] | None) -> None:
    """Hold calls against the tools on offer; without any tools there is nothing to hold them against.

    Raises:
        Unusable: a tool that was not on offer, arguments that break its schema, or a `$ref` that cannot be followed.
    """
    if not tools:
        return
    named = {tool["name"]: tool for tool in tools}
    for call in calls:
        if call["name"] not in named:
            raise Unusable("tool_not_listed", f"{call['name']} is not among {', '.join(named)}")
        try:
            broken = call_violations(call["arguments"], named[call["name"]])
        except (RecursionError, Unresolvable) as error:
            raise Unusable("schema_fault", f"a $ref that cannot be followed: {error}") from None
        if broken:
            raise Unusable("gold_breaks_schema", "; ".join(broken))


def check_value(value: Any, schema: dict) -> None:
    """Hold a JSON value against its schema.

    Raises:
        Unusable: it breaks it, or a `$ref` cannot be followed.
    """
    try:
        broken = violations(value, schema)
    except Unresolvable as error:
        raise Unusable("schema_fault", f"a $ref that cannot be followed: {error}") from None
    if broken:
        raise Unusable("gold_breaks_schema", "; ".join(broken))


def check_accept(accept: Any, calls: list[dict], tools: list[dict] | None) -> None:
    """Every argument that `accept` names is one of its call's tool, or of the call itself where no tools are known.

    Raises:
        Unusable: one is not, or several calls do not have one map each.
    """
    maps = [accept] if isinstance(accept, dict) else accept or []
    if len(maps) not in (0, len(calls)):
        raise Unusable("accept_unknown", f"`accept` has {len(maps)} maps for {len(calls)} calls")
    named = {tool["name"]: tool for tool in tools or []}
    for options, call in zip(maps, calls, strict=False):
        parameters = named[call["name"]]["parameters"] if call["name"] in named else None
        for key in options or {}:
            known = key in call["arguments"] or (parameters and (is_open(parameters) or lists_property(parameters, key)))
            if not known and (parameters or not tools):
                raise Unusable("accept_unknown", f"`accept` names {key!r}, which {call['name']} does not have")
