"""The grammar of a row's reply as this checkpoint writes it: its chat template's calls, the thought in front, the tokens that end it.

How a template writes calls is found by rendering probes, as in `native`: the text around a call's name and its arguments, between two
calls, and the separators of the arguments' JSON. A template that writes calls in another form than JSON gives no grammar.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from slm_swap.clients.endings import turn_ending, turn_opening
from slm_swap.clients.grammar import CALL_ID, TEXT_CALLS, CallForm, Frame, NoGrammar, grammar_of
from slm_swap.clients.native import chat_format, native_turn, uses_tools
from slm_swap.clients.thinking import MARKS, cut_thinking, has_channels, prefilled, thinking
from slm_swap.common.errors import UserError
from slm_swap.rows.prompts import Request, Wanted

_SEPARATORS = ((", ", ": "), (",", ":"), (",", ": "), (", ", ":"))
_NAMES = ("probe_first_7d1f", "probe_second_7d1f", "probe_third_7d1f")
_ARGUMENTS = {"probe_b": "ä<'&/\n", "probe_a": [1, True, None, {"probe_c": 0.5}]}
_MARK = re.compile(r"\s*(<[^<>]*>|\[[A-Z_]+\])")  # what opens a call in a template's own words


def row_grammar(tokenizer: Any, request: Request, ends: Iterable[int], special: Mapping[str, int]) -> str:
    """The grammar of a row's reply, which one of the tokens `ends` ends; `special` is `Grammars.special`.

    Raises:
        NoGrammar: there is none.
    """
    wanted = request.wanted or Wanted("value")
    if wanted.form == "object" and request.native:  # its prompt does not speak of an object
        wanted = wanted._replace(form="value")
    calls = call_form(tokenizer) if request.native and uses_tools(request) and wanted.form in ("call", "calls") else TEXT_CALLS
    return grammar_of(wanted, _frame(tokenizer, tuple(ends), special), calls)


def _frame(tokenizer: Any, ends: tuple[int, ...], special: Mapping[str, int]) -> Frame:
    if has_channels(tokenizer):
        raise NoGrammar("replies in channels")
    thought = None
    if thinking(tokenizer) in ("on", "always"):
        close = prefilled(tokenizer)
        shown = [marks for marks in MARKS if marks[1] in str(tokenizer.chat_template)]
        thought = (None, close) if close else (shown or MARKS)[0]
    opening, ending = "" if thought else turn_opening(tokenizer), turn_ending(tokenizer)
    closing = ending.text.removesuffix(tokenizer.convert_ids_to_tokens(ending.id)) if ending else ""
    return Frame(opening, thought, closing, ends, _spaced(tokenizer), special, _plain(tokenizer))


@lru_cache(maxsize=8)
def _spaced(tokenizer: Any) -> bool:
    """Whether the tokenizer spells spaces as SentencePiece does, which puts one in front of a text."""
    return any("▁" in token for token in tokenizer.tokenize("a b"))


@lru_cache(maxsize=8)
def _plain(tokenizer: Any) -> frozenset[str]:
    """The added tokens that are text."""
    return frozenset(str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special)


def call_form(tokenizer: Any) -> CallForm:
    """How the chat template writes calls.

    Raises:
        NoGrammar: not as JSON behind their names, or not at all.
    """
    found = _call_form(tokenizer, str(tokenizer.chat_template))
    if isinstance(found, str):
        raise NoGrammar(found)
    return found


@lru_cache(maxsize=8)
def _call_form(tokenizer: Any, template: str) -> CallForm | str:
    """`call_form`, or the reason why there is none."""
    try:
        one = _written(tokenizer, 1)
    except UserError:
        return "the chat template writes no calls"
    for separators in _SEPARATORS:
        arguments = json.dumps(_ARGUMENTS, ensure_ascii=False, separators=separators)
        parts = re.split(f"{_NAMES[0]}|{re.escape(arguments)}", one)
        if len(parts) == 3 and one == f"{parts[0]}{_NAMES[0]}{parts[1]}{arguments}{parts[2]}":
            break
    else:
        return "the chat template writes calls otherwise than as JSON behind a name"
    opening, between, closing = parts
    joint = None
    try:
        pieces = re.split("|".join([*_NAMES, re.escape(arguments)]), _written(tokenizer, 3))
        if len(pieces) == 7 and pieces[0] == opening and pieces[6] == closing and {*pieces[1::2]} == {between} and pieces[2] == pieces[4]:
            joint = pieces[2]
    except UserError:
        pass  # one call in a turn
    text, mark, begun = TEXT_CALLS.text, _MARK.match(opening), opening.strip()
    if not begun:
        return "the chat template writes calls without a mark"
    if not mark and begun[0] in "{[":  # so a text that begins like a call is one
        text, begun = r"(?s:[^\s{\[].*)", None
    return CallForm("", between, "", opening, closing, joint, separators, text, mark[1] if mark else begun)


def _written(tokenizer: Any, count: int) -> str:
    """What the template writes for so many calls, without a thought in front of them and the token that ends them."""
    tools = [{"name": name, "description": "", "parameters": {"type": "object", "properties": {}}} for name in _NAMES]
    asked = Request([{"role": "user", "content": "probe user 7d1f"}], tools, native=True)
    calls = [{"name": name, "arguments": _ARGUMENTS} for name in _NAMES[:count]]
    text, form = native_turn(tokenizer, asked, "", calls)[1], chat_format(tokenizer)
    text = text.removesuffix(form.call_end).removesuffix(form.end)
    opening = turn_opening(tokenizer)
    if opening and text.startswith(opening):
        text = text.removeprefix(opening)
    else:
        rest, thought = cut_thinking(text, prefilled(tokenizer))
        text = rest if thought and thought != text else text
    return re.sub(r"call0000\d", CALL_ID, text)
