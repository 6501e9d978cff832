"""Grammars over the tokens of a model, by llguidance: which token may come next, for each row of a batch."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from slm_swap.clients.engines import Prompt
from slm_swap.common.errors import UserError

_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")  # in the grammar, in front of an error
KEPT = 512  # compiled grammars: a tool set takes some milliseconds to be compiled, and some 100 KiB
T = TypeVar("T")


class Grammars:
    """Compiled grammars for one tokenizer, each distinct text compiled once.

    `special` are the texts that are tokens and no text for it, with their ids. `seconds` is what compiling has taken, `compiled` how many there were.

    Raises:
        UserError: the tokenizer is none of the tokenizers package.
    """

    def __init__(self, tokenizer: Any):
        from llguidance.hf import from_tokenizer

        try:
            self._tokens = from_tokenizer(tokenizer)
        except (ValueError, AttributeError) as error:
            raise UserError(f"--constrain: llguidance cannot read this checkpoint's tokenizer ({error}): leave the flag out") from None
        added = tokenizer.added_tokens_decoder.items()
        self.special = {str(token): id for id, token in added if self._tokens.is_special_token(id)}
        self.words = -(-self._tokens.vocab_size // 32)  # 32-bit words of a mask
        self._made: OrderedDict[str, Any] = OrderedDict()
        self._texts: OrderedDict[str, str] = OrderedDict()
        self.seconds, self.compiled = 0.0, 0

    def text(self, wanted: str, write: Callable[[], str]) -> str:
        """The grammar that `write` gives for what is wanted, written once."""
        return _kept(self._texts, wanted, write)

    def why_not(self, grammar: str) -> str | None:
        """Why llguidance takes no such grammar; None where it does."""
        made = self._compiled(grammar)
        if not made.is_error():
            return None
        lines = made.get_error().split("\n")
        told = next((line for line in lines if line.startswith("error:")), lines[0])  # of a regular expression, below a picture of it
        return "llguidance: " + " ".join(_PLACE.sub("", told.removeprefix("error:")).split())[:120]

    def matcher(self, grammar: str) -> Any:
        """A matcher at the start of a reply."""
        return self._compiled(grammar).deep_copy()

    def _compiled(self, grammar: str) -> Any:
        return _kept(self._made, grammar, lambda: self._compile(grammar))

    def _compile(self, grammar: str) -> Any:
        from time import perf_counter

        from llguidance import LLMatcher

        started = perf_counter()
        made = LLMatcher(self._tokens, grammar, log_level=0)
        self.seconds, self.compiled = self.seconds + perf_counter() - started, self.compiled + 1
        return made


def _kept(made: OrderedDict[str, T], key: str, make: Callable[[], T]) -> T:
    """What is made of a key, or was: the last KEPT ones are kept."""
    if key not in made:
        made[key] = make()
        if len(made) > KEPT:
            made.popitem(last=False)
    made.move_to_end(key)
    return made[key]


class Masks:
    """Where each row of a batch is in its grammar; rows without one are free."""

    def __init__(self, grammars: Grammars, prompts: Sequence[Prompt]):
        self._grammars = grammars
        self._matchers = [grammars.matcher(prompt.grammar) if prompt.grammar else None for prompt in prompts]

    def apply(self, logits: Any, rows: Sequence[int]) -> Any:
        """Logits, [len(rows), vocabulary], with minus infinity for the tokens that may not come next; `rows` says whose they are.

        What is computed on the host is computed while the device still works on the logits.
        """
        if all(self._matchers[row] is None for row in rows):
            return logits
        bits = host_bits(len(rows), logits)
        self.fill(bits, rows)
        return masked(logits, bits.to(logits.device, non_blocking=True))

    def fill(self, bits: Any, rows: Sequence[int]) -> None:
        """Set the `host_bits` of the first len(rows) rows: 1 where a token may come next.

        One row after the other, 0.05 ms each on two cores: llguidance's threads took 3 ms for 8 rows, and 12 ms now and then, while an H200 waited (14 cores).
        """
        words = self._grammars.words
        bits[: len(rows)] = -1
        asked = [(self._matchers[row], at) for at, row in enumerate(rows) if self._matchers[row] is not None]
        if not asked:
            return
        own = bits if bits.shape[1] == words else bits.new_zeros(len(rows), words)
        for matcher, at in asked:
            matcher.unsafe_compute_mask_ptr(own.data_ptr() + at * words * 4, words * 4)
        if own is not bits:
            bound, least = [at for _, at in asked], min(words, bits.shape[1])
            bits[bound] = 0  # embeddings that are no tokens
            bits[bound, :least] = own[bound, :least]

    def take(self, row: int, token: int, done: bool) -> None:
        """Go on by one token of a row; one that is done is free from here on.

        Raises:
            UserError: the grammar did not allow it.
        """
        matcher = self._matchers[row]
        if matcher is None:
            return
        if done:
            self._matchers[row] = None
        elif not matcher.consume_token(token):
            told = " ".join(matcher.get_error().split())[:160]
            raise UserError(f"llguidance failed while it decoded ({told}): run the same command again without --constrain")


def host_bits(rows: int, logits: Any) -> Any:
    """Room for the masks of some rows of logits like these, [rows, words] of 32 bits; pinned where the logits are on a GPU."""
    import torch

    return torch.full((rows, -(-logits.shape[1] // 32)), -1, dtype=torch.int32, pin_memory=logits.device.type == "cuda")


def masked(logits: Any, bits: Any) -> Any:
    """Logits, [rows, vocabulary], with minus infinity where `bits`, [rows, words] on the same device, are 0."""
    import torch

    barred = (bits[:, :, None] & (1 << torch.arange(32, dtype=torch.int32, device=bits.device))) == 0
    return logits.masked_fill(barred.flatten(1)[:, : logits.shape[1]], float("-inf"))
