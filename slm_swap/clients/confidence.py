"""How sure a small model was of a reply: from the log-probabilities of the tokens that say something, at no further call.

What a reply says are the *values* of its JSON and the names of the tools that it calls. Brackets, keys, punctuation and a chat format's marks
are nearly certain in any reply of that form, right or wrong, and would only dilute it. All log-probabilities and margins are in nats.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from slm_swap.clients.engines import Chance
from slm_swap.clients.native import uses_tools
from slm_swap.clients.native_replies import RECIPIENT, Call, end_of_json, is_json
from slm_swap.clients.thinking import THINK, channel_messages, cut_served_thinking, cut_thinking, has_channels, prefilled
from slm_swap.rows.prompts import Request

SIGNALS = ("min_logprob", "sum_logprob", "tool_logprob", "min_margin")  # the larger, the surer
DIGITS = 6  # decimals that are kept
PIECES = 65_536  # tokens whose text is kept
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no whole character
_CALL = re.compile(r"<tool_call\s+name\s*=\s*[\"']([^\"'<>]+)[\"']\s*>", re.IGNORECASE)
_CLOSE = "</tool_call>"
_FENCE = re.compile(r"```(?:json)?\s*(?=[{\[])", re.IGNORECASE)
_PART = re.compile(r'"(?:[^"\\]|\\.)*+(?P<closed>")?|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)

Span = tuple[int, int]  # characters of a text, from the first up to and without the last


class Places(NamedTuple):
    """Where a reply says what, in order: its values, the names of the tools that it calls, and all of its text."""

    values: list[Span]
    names: list[Span]
    text: Span


def confidence(
    tokenizer: Any, request: Request, tokens: Sequence[int], chances: Sequence[Chance] | None, read: tuple[str, list[Call] | None, str]
) -> dict[str, Any] | None:
    """How sure the model was of a reply.

    Args:
        tokens: those of the reply without the one that ended it, thinking included.
        chances: theirs; a further one, of the end token, is not looked at.
        read: what `native.read_reply` made of them: text, calls, thinking.

    Gives `min_logprob` and `sum_logprob`, the smallest and the sum of the log-probabilities of the tokens that hold a character of a value
    or of a tool's name; `tokens`, how many these are; `min_margin`, the smallest margin between the most likely and the second token among
    them; and `tool_logprob`, the sum over the tokens of the names alone (None where there is no call). Characters of a value are those of
    numbers and literals, and those inside the quotes of a string; of an empty string the quotes.

    In a reply without calls and without JSON all tokens of the text count, and so they do in one without any value (`{}`). JSON that does
    not parse is read as far as it goes. None, where the engine gave no chances, where the reply has no text or is nothing but thinking,
    where a call's name or arguments are not found in it as they were read, or where a number is not finite.
    """
    if chances is None or not tokens:
        return None
    whole = _decoded(tokenizer, tokens)
    places = _places(tokenizer, request, whole, read)
    return _summary(places, token_spans(tokenizer, tokens, whole) if places else None, chances)


def served_confidence(
    request: Request, pieces: Sequence[bytes], chances: Sequence[Chance], read: tuple[str, list[Call] | None, str]
) -> dict[str, Any] | None:
    """`confidence` of a reply whose model is behind a server: `pieces` are the bytes of its tokens as the server tells them, which stand in for
    a tokenizer. None, too, where they are no text together."""
    try:
        whole = b"".join(pieces).decode("utf-8")
    except UnicodeDecodeError:
        return None
    places = _places(None, request, whole, read) if pieces else None
    return _summary(places, piece_spans(pieces) if places else None, chances)


def _summary(places: Places | None, spans: Sequence[Span] | None, chances: Sequence[Chance]) -> dict[str, Any] | None:
    """What the chances of the tokens in these places say; None where nothing is found."""
    if places is None or spans is None:
        return None
    named = tokens_in(spans, places.names)
    counted = sorted({*tokens_in(spans, places.values), *named}) or tokens_in(spans, [places.text])
    logprobs, margins = [chances[at][0] for at in counted], [chances[at][1] for at in counted]
    if not counted or not all(map(math.isfinite, logprobs + margins)):
        return None
    return {
        "min_logprob": _rounded(min(logprobs)),
        "sum_logprob": _rounded(math.fsum(logprobs)),
        "tokens": len(counted),
        "tool_logprob": _rounded(math.fsum(chances[at][0] for at in named)) if named else None,
        "min_margin": round(min(margins), DIGITS),
    }


def _rounded(logprob: float) -> float:
    """A log-probability as it is kept: rounding errors may have put it above 0, and -0.0 would be written as such."""
    return round(min(logprob, 0.0), DIGITS) + 0.0


# -- Tokens and their characters -------------------------------------------------------------------------------------------------


def token_spans(tokenizer: Any, tokens: Sequence[int], whole: str) -> list[Span] | None:
    """The characters of each token in the whole text that they decode to. Tokens that share a character each have it.

    Where the texts of the single tokens make up the whole, they are what is counted. Elsewhere (a character over several tokens, a space
    that SentencePiece writes only behind another token) the tokens are decoded one after the other, each behind those that matter for it.
    None where neither adds up to the whole.
    """
    pieces = [_piece(tokenizer, token) for token in tokens]
    if "".join(pieces) == whole:
        return list(pairwise(accumulate(map(len, pieces), initial=0)))
    spans: list[Span] = []
    first = read = place = 0  # those from `first` to `read` are given out, up to `place`, and decoded again with what follows them
    for at in range(len(tokens)):
        now = _decoded(tokenizer, tokens[first : at + 1])
        if now.endswith(BROKEN) and at + 1 < len(tokens):
            continue
        end = place + len(now) - len(_decoded(tokenizer, tokens[first:read]))
        spans += [(place, end)] * (at + 1 - read)
        first, read, place = read, at + 1, end
    return spans if place == len(whole) else None


def piece_spans(pieces: Sequence[bytes]) -> list[Span]:
    """The characters of each piece in the text that all are together. Pieces that share a character each have it."""
    spans, begun = [], 0  # characters whose first byte has been seen
    for piece in pieces:
        own = sum(byte & 0xC0 != 0x80 for byte in piece)
        goes_on = bool(piece) and piece[0] & 0xC0 == 0x80
        spans.append((begun - goes_on, begun + own))
        begun += own
    return spans


def tokens_in(spans: Sequence[Span], parts: Sequence[Span]) -> list[int]:
    """The tokens of which a character stands in one of the parts, which are in order and apart."""
    found, at = [], 0
    for token, (start, end) in enumerate(spans):
        while at < len(parts) and parts[at][1] <= start:
            at += 1
        if at < len(parts) and max(start, parts[at][0]) < min(end, parts[at][1]):
            found.append(token)
    return found


@lru_cache(maxsize=PIECES)
def _piece(tokenizer: Any, token: int) -> str:
    return _decoded(tokenizer, [token])


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# -- Values and names in a reply -------------------------------------------------------------------------------------------------


def value_spans(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Where the values of the JSON that begins at `start` stand, up to where it ends or to `end`; of broken JSON as far as it goes."""
    end, found, open_ = len(text) if end is None else end, [], []
    key = False  # whether a key is due
    for part in _PART.finditer(text, start, end):
        mark = part[0]
        if mark in ("{", "["):
            open_.append(mark)
            key = mark == "{"
        elif mark in ("}", "]"):
            if open_:
                open_.pop()
            key = False
        elif mark == ",":
            key = bool(open_) and open_[-1] == "{"
        elif mark == ":":
            key = False
        elif not key:
            quoted = mark.startswith('"')
            inside = (part.start() + 1, part.end() - bool(part["closed"])) if quoted else part.span()
            if inside[0] < inside[1] or part["closed"]:
                found.append(inside if inside[0] < inside[1] else part.span())
        if not open_:
            break
    return found


def _places(tokenizer: Any, request: Request, whole: str, read: tuple[str, list[Call] | None, str]) -> Places | None:
    """Where a decoded reply says what (`tokenizer` None: of a server's, whose channels and prompt are not known); None where it says nothing, or says it where nothing is found."""
    text, calls, thinking = read
    if not calls and (not text.strip() or (thinking and text.startswith(THINK))):
        return None
    native = request.native and uses_tools(request)
    if native and tokenizer is not None and has_channels(tokenizer):
        return _in_channels(whole, bool(calls))
    start = _behind_thinking(tokenizer, whole, thinking)
    return _in_calls(whole, start, calls) if calls else _in_text(whole, _span_of(text, whole, start), tagged=not native)


def _behind_thinking(tokenizer: Any, whole: str, thinking: str) -> int:
    """Where a reply begins behind its thinking."""
    cut = ""
    if thinking:
        cut = (cut_served_thinking(whole) if tokenizer is None else cut_thinking(whole, prefilled(tokenizer)))[1]
    if cut and cut != whole:
        return len(cut)
    return max(0, whole.find(thinking)) + len(thinking)  # its marks are the format's own


def _span_of(text: str, whole: str, start: int) -> Span:
    """Where a text stands in the whole, without white space around it; all that follows `start` where special tokens break it up."""
    text = text.strip()
    at = whole.find(text, start)
    return (at, at + len(text)) if at >= 0 else (start, len(whole))


def _in_text(whole: str, shown: Span, tagged: bool) -> Places:
    """In a reply without calls of a chat format's own: calls in the words of the text form where it is asked for them (`tagged`), else JSON."""
    start, end = shown
    if tagged and (marks := list(_CALL.finditer(whole, start, end))):
        values = []
        for mark, border in zip(marks, [*(mark.start() for mark in marks[1:]), end], strict=True):
            closed = whole.find(_CLOSE, mark.end(), border)
            if closed >= 0 and end_of_json(whole, mark.end() + len(whole[mark.end() :]) - len(whole[mark.end() :].lstrip())) is None:
                border = closed  # a quote that is missing would let the last string go on
            values += value_spans(whole, mark.end(), border)
        return Places(values, [mark.span(1) for mark in marks], shown)
    fence = _FENCE.match(whole, start, end)
    at = fence.end() if fence else start
    if whole[at : at + 1] in ("{", "[") or is_json(whole[start:end]):
        return Places(value_spans(whole, at, end), [], shown)
    return Places([], [], shown)


def _in_channels(whole: str, calls: bool) -> Places:
    """In a reply of gpt-oss: a message for a function is a call; the last message that is neither one nor thinking is the text."""
    values, names, text, at = [], [], (0, len(whole)), 0
    for message in channel_messages(whole):
        start = message.end - len(message.body)
        if recipient := RECIPIENT.search(message.header):
            header = whole.index(message.header, at, start)
            names.append((header + recipient.start(1), header + recipient.end(1)))
            values += value_spans(whole, start, message.end)
        elif "analysis" not in message.header:
            text = (start, message.end)
        at = message.end
    return Places(values, names, text) if calls else _in_text(whole, text, tagged=False)


def _in_calls(whole: str, start: int, calls: list[Call]) -> Places | None:
    """In a chat format's own calls: each call's arguments as they were read, and its name before or behind them; None where one is not found."""
    values, names, at = [], [], start
    for call in calls:
        name, arguments = call["name"], call["arguments"]
        place = whole.find(arguments, at) if arguments else -1
        if place >= 0:
            own, end = value_spans(whole, place, place + len(arguments)), place + len(arguments)
        else:  # between tags, or in JSON of the model's own
            first = _alone(name, whole, at)
            place = end = first[-1] if first else at
            if (found := _tagged(whole, end, arguments)) is None:
                return None
            own, end = found
        if name:
            before, behind, inside = _alone(name, whole, at, place, last=True), _alone(name, whole, end), _alone(name, whole, place, end)
            if (span := before or behind or inside) is None:
                return None
            names.append(span)
            end = max(end, span[1])
        values, at = values + own, end
    return Places(sorted(values), sorted(names), (start, len(whole)))


def _alone(text: str, whole: str, start: int, end: int | None = None, last: bool = False) -> Span | None:
    """Where a text stands as words of its own, and not as a key of JSON: the first time between two places, or the last."""
    before, behind = r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else ""
    pattern = re.compile(rf'{before}{re.escape(text)}{behind}(?!"\s*:)')
    found = [match.span() for match in pattern.finditer(whole, start, len(whole) if end is None else end)] if text else []
    return found[-1 if last else 0] if found else None


def _tagged(whole: str, start: int, arguments: str) -> tuple[list[Span], int] | None:
    """(the values, the place behind them) of arguments that stand in a reply in another form than JSON: each value behind its key.

    None where one of them is not found.
    """
    try:
        told = json.loads(arguments, parse_float=str, parse_int=str, parse_constant=str) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return None
    found, at = [], start
    for is_key, text in _walk(told):
        before, behind = r"(?<!\w)" if text[:1].isalnum() else "", r"(?!\w)" if text[-1:].isalnum() else ""
        match = re.compile(before + re.escape(text) + behind).search(whole, at)
        if match is None:
            return None
        at = match.end()
        if not is_key and text:
            found.append(match.span())
    return found, at


def _walk(value: Any) -> Iterator[tuple[bool, str]]:
    """(whether it is a key, its text) of all keys and values of a JSON value, in order."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield True, key
            yield from _walk(child)
    elif isinstance(value, list):
        for child in value:
            yield from _walk(child)
    else:
        yield False, value if isinstance(value, str) else json.dumps(value)
