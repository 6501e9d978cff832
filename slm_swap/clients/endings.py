"""Where a reply ends: one answer for both engines, for training and for merging.

A chat template ends a turn with a token of its own, perhaps behind white space. generation_config, config and tokenizer name ends
too, and each may lack the others': a reply that is not ended by all of them runs on to the limit.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

from slm_swap.clients.templates import apply
from slm_swap.clients.thinking import prefilled
from slm_swap.common.errors import UserError

_ASKED, _SAID, _NEXT = "probe asked 7d1f", "probe said 7d1f", "probe next 7d1f"


class Ending(NamedTuple):
    """What a chat template writes behind a reply's text: `text` up to and with the token `id` that ends it."""

    text: str
    id: int


def reply_ends(tokenizer: Any, *named: int | Collection[int] | None) -> set[int]:
    """Every token that ends a reply: the chat template's, the tokenizer's, and those `named` by generation_config and config.

    Raises:
        UserError: there is none, or one that is no number.
    """
    ends = {tokenizer.eos_token_id}
    for given in named:
        ends.update(given if isinstance(given, (list, tuple, set)) else [given])
    ends.update(ending.id for ending in (turn_ending(tokenizer), call_ending(tokenizer)) if ending)
    ends.discard(None)
    if odd := [end for end in ends if type(end) is not int]:
        raise UserError(f"generation_config.json or config.json names {odd[0]!r} as eos_token_id, which takes numbers of tokens: correct it there")
    if not ends:
        raise UserError("nothing ends a reply: neither the chat template nor generation_config, config or tokenizer name an end: use an instruct checkpoint")
    return ends


def require_ending(tokenizer: Any) -> Ending:
    """`turn_ending` where there has to be one.

    Raises:
        UserError: the chat template has none.
    """
    ending = turn_ending(tokenizer)
    if ending is None:
        raise UserError("the chat template ends a reply with no token of its own, so that a model could not learn to stop: use an instruct checkpoint")
    return ending


def turn_opening(tokenizer: Any) -> str:
    """What the chat template writes between a prompt and a reply's text: an empty thought, or the mark of gpt-oss' channel `final`.

    Where a prompt opens thinking that the template's own replies do not close, it is closed here: a reply would never begin.
    """
    asked = [{"role": "user", "content": _ASKED}]
    prompt, whole = (apply(tokenizer, turn, open_turn) for turn, open_turn in ((asked, True), ([*asked, {"role": "assistant", "content": _SAID}], False)))
    if whole.startswith(prompt):
        return whole[len(prompt) :].partition(_SAID)[0]
    close = prefilled(tokenizer)
    return f"\n{close}\n\n" if close else ""


def turn_ending(tokenizer: Any) -> Ending | None:
    """How the chat template ends a reply; None where it writes no token of its own behind one, or does not show a question and its answer."""
    return _turn_ending(_Key(tokenizer, tokenizer.chat_template))


def call_ending(tokenizer: Any) -> Ending | None:
    """How the chat template ends a call, where that is another token than a text's, as in gpt-oss; else, and where it shows none, None."""
    return _call_ending(_Key(tokenizer, tokenizer.chat_template))


@lru_cache(maxsize=8)
def _call_ending(key: "_Key") -> Ending | None:
    from jinja2 import TemplateError

    tokenizer, text = key.tokenizer, turn_ending(key.tokenizer)
    call = {"id": "call00001", "type": "function", "function": {"name": "probe_call", "arguments": {"probe": _SAID}}}
    turn = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        shown = apply(tokenizer, turn, open_turn=False)
    except TemplateError:  # it knows no calls, or wants their tools
        return None
    written = shown.rpartition(_SAID)[2] if _SAID in shown else ""
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    if text is None or text.id in ids or not ids or ids[-1] not in _marks(tokenizer):
        return None
    mark = tokenizer.convert_ids_to_tokens(ids[-1])
    return Ending(written[: written.rindex(mark) + len(mark)], ids[-1])


class _Key(NamedTuple):
    """A tokenizer with its present template: tests and users may give it another."""

    tokenizer: Any
    template: Any

    def __hash__(self) -> int:
        return hash((id(self.tokenizer), str(self.template)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.tokenizer is other.tokenizer and self.template == other.template


@lru_cache(maxsize=8)
def _turn_ending(key: _Key) -> Ending | None:
    from jinja2 import TemplateError

    tokenizer = key.tokenizer
    turn = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    try:
        last = apply(tokenizer, turn, open_turn=False)
        inside = apply(tokenizer, [*turn, {"role": "user", "content": _NEXT}], open_turn=False)
    except TemplateError:
        return None
    if not all(probe in shown for shown in (last, inside) for probe in (_ASKED, _SAID)):
        return None  # it shows the last message alone, or nothing of what is said
    own = _marks(tokenizer)
    ending = _first(tokenizer, last.split(_SAID, 1)[1], own)
    # some write it between two turns alone, in front of what opens the user's
    return ending or _first(tokenizer, inside.split(_SAID, 1)[1].split(_NEXT, 1)[0], own, inside.split(_ASKED, 1)[0])


def _marks(tokenizer: Any) -> set[int]:
    """The tokens that are no text: special ones, and others that were added to the vocabulary."""
    return set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())


def _first(tokenizer: Any, text: str, own: set[int], opening: str = "") -> Ending | None:
    """The first of the tokens `own` in a text, with what stands in front of it; the tokens with which `opening` ends are left out."""
    ids, opened = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, opening))
    while ids and opened and ids[-1] == opened[-1]:
        ids, opened = ids[:-1], opened[:-1]
    found = next((token for token in ids if token in own), None)
    if found is None:
        return None
    mark = tokenizer.convert_ids_to_tokens(found)
    at = text.find(mark)
    return Ending(text[: at + len(mark)], found) if at >= 0 else None
