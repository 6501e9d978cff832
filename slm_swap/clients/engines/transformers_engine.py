"""Greedy decoding with transformers, in batches of prompts of like length.

A decode step of a small model is bound by launching its kernels, not by arithmetic: on a CUDA GPU the step is captured once for each
shape in a CUDA graph over a static cache and replayed. On a CPU, for models whose cache is not a plain one, and once capturing has
failed, each step is launched as usual over a cache that grows.
"""

import sys
import time
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from slm_swap.clients.architecture import config_ends, longrope_border, usable_context
from slm_swap.clients.endings import reply_ends
from slm_swap.clients.engines import Chance, DeviceFailed, Generated, Prompt
from slm_swap.clients.engines.captured import (
    CACHE_ROUND,
    CapturedDecoder,
    Row,
    cache_of,
    can_capture,
    chances_of,
    one_token_cache,
    positions_of,
)
from slm_swap.clients.engines.masks import Grammars, Masks
from slm_swap.clients.loading import first_line, padding_id
from slm_swap.common.errors import UserError

WINDOW = 2048  # prompts that are sorted by length together
ROUND = 32  # prompts are padded to a multiple of it: fewer shapes
LARGEST_BATCH = 256  # what `auto` takes at most: from here on arithmetic binds, not launches


class TransformersEngine:
    """A causal language model and its tokenizer behind `engines.Engine`.

    Args:
        batch_size: prompts in one batch; "auto" takes what fits in the free memory.
        capture: use CUDA graphs where they can be used. They keep memory.
        grammars: what the prompts' grammars are compiled by; None: none has one.

    A batch that does not fit in memory is halved and tried again. Rows leave a batch when they are done: it goes on with the others
    once half have left.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str = 8, capture: bool = True, grammars: Grammars | None = None):
        from slm_swap.clients.engines.attention import use_grouped_attention

        self.model, self.tokenizer, self.grammars = model, tokenizer, grammars
        use_grouped_attention(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.context = usable_context(model.config, tokenizer)
        self.ends = reply_ends(tokenizer, model.generation_config.eos_token_id, *config_ends(model.config))
        self.batch_size = None if batch_size == "auto" else batch_size
        self.halved = 0
        self.fits: int | None = None  # what "auto" would take, once it is known
        self._batches, self._border = 0, longrope_border(model.config)
        self._captured = CapturedDecoder(model, self.ends) if capture and can_capture(model) else None
        self.capture_error: str | None = None

    def generate(self, prompts: Iterable[Prompt], answered: Container[int] = ()) -> Generator[Generated]:
        """Batches are those of all prompts, so that an interrupted run goes on with the batches that it would have had: one
        without an unanswered prompt is left out, and of the others the answered prompts are computed again and not given."""
        prompts = iter(prompts)
        while window := list(islice(prompts, WINDOW)):
            if self.batch_size is None:
                self.batch_size = fitting_batch(self.model, window)
            elif self.fits is None and self.model.device.type == "cuda" and len(window) > self.batch_size:
                self.fits = fitting_batch(self.model, window)
            window.sort(key=lambda prompt: (-len(prompt.tokens), prompt.index))  # the longest first: if it fits, all do
            for batch in self._cut(window):
                if any(prompt.index not in answered for prompt in batch):
                    made = self._halving(batch, str(self._batches))
                    again = [other for prompt, one in zip(batch, made, strict=True) if prompt.again and (other := prompt.again(one))]
                    made = {one.index: one for one in [*made, *(self._halving(again, str(self._batches)) if again else ())]}
                    yield from (one for one in made.values() if one.index not in answered)
                self._batches += 1

    def _cut(self, window: list[Prompt]) -> Iterator[list[Prompt]]:
        """Batches of prompts in their order. Where LongRoPE's factors hang on the longest row, rows above the border, rows below it, and
        each row that may cross it are apart: whoever is in a batch then changes no other's reply."""
        groups: dict[str, list[Prompt]] = {}
        for prompt in window:
            length, border = len(prompt.tokens), self._border
            place = "below" if border is None or length + prompt.limit <= border else "above" if length > border else f"alone {prompt.index}"
            groups.setdefault(place, []).append(prompt)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _halving(self, batch: Sequence[Prompt], name: str) -> list[Generated]:
        import torch

        started = time.perf_counter()
        try:
            rows = self._decode(batch)
        except RuntimeError as error:
            if not out_of_memory(error):
                if isinstance(error, torch.AcceleratorError):
                    raise DeviceFailed(
                        f"the device failed ({first_line(error)}): run the same command again; if it fails there again, use --engine vllm or another machine"
                    ) from None
                raise
        else:
            seconds = time.perf_counter() - started
            return [self._generated(prompt, row, seconds, name) for prompt, row in zip(batch, rows, strict=True)]
        if len(batch) == 1:
            raise UserError(
                f"a prompt of {len(batch[0].tokens)} tokens alone does not fit in memory: use --precision nf4 or a larger GPU"
            )
        self.halved += 1
        if self._captured:
            self._captured.clear()
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._halving(batch[:half], name) + self._halving(batch[half:], name)

    def _generated(self, prompt: Prompt, row: Row, seconds: float, name: str) -> Generated:
        tokens, chances = row
        stopped = tokens[-1] in self.ends
        return Generated(prompt.index, tokens[:-1] if stopped else tokens, stopped, seconds, batch=name, chances=chances)

    def _decode(self, batch: Sequence[Prompt]) -> list[Row]:
        """The new tokens of each prompt, the one that ended it included, and their chances."""
        import torch

        width = -(-max(len(prompt.tokens) for prompt in batch) // ROUND) * ROUND
        width = min(width, self.context - 1)
        pad = padding_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(prompt.tokens)) + prompt.tokens for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in batch])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        limits = [prompt.limit for prompt in batch]
        masks = Masks(self.grammars, batch) if self.grammars and any(prompt.grammar for prompt in batch) else None
        with torch.inference_mode():
            if self._captured and self._captured.fits(width + max(limits)):
                try:
                    return self._captured.decode(ids, mask, limits, masks)
                except UserError:
                    raise
                except Exception as error:  # of any package: whatever a model does in its step
                    if out_of_memory(error):
                        raise
                    reason = f"{type(error).__name__}: {first_line(error)}"
                self._stop_capturing(reason)  # here, where the error no longer holds the decoder's tensors
                masks = masks and Masks(self.grammars, batch)
            return self._step_by_step(ids, mask, limits, masks)

    def _stop_capturing(self, reason: str) -> None:
        import torch

        print(
            f"warning: the decode step of {type(self.model).__name__} cannot be captured ({reason}): its steps are launched one by one, "
            "which is slower; the replies are the same",
            file=sys.stderr,
            flush=True,
        )
        self.capture_error, self._captured = reason, None
        torch.cuda.empty_cache()  # the graphs' and the static caches'

    def _step_by_step(self, ids: Any, mask: Any, limits: list[int], masks: Masks | None = None) -> list[Row]:
        import torch

        tokens: list[list[int]] = [[] for _ in limits]
        steps: list[tuple[list[int], Any]] = []  # the rows of each step with their chances, which are fetched once all is done
        rows = list(range(len(limits)))  # the prompts that are still in the batch
        done = [False] * len(limits)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True, logits_to_keep=1)
        position, cache = mask.sum(1, keepdim=True), cache_of(self.model, out)
        while True:
            logits = out.logits[:, -1]
            new = (masks.apply(logits, rows) if masks else logits).argmax(-1)
            steps.append((rows, chances_of(logits, new)))
            for row, token in zip(rows, new.tolist(), strict=True):
                if not done[row]:
                    tokens[row].append(token)
                    done[row] = token in self.ends or len(tokens[row]) == limits[row]
                    if masks:
                        masks.take(row, token, done[row])
            if all(done):
                return list(zip(tokens, chances_by_row(steps, [len(row) for row in tokens]), strict=True))
            left = [at for at, row in enumerate(rows) if not done[row]]
            if len(left) <= len(rows) // 2:
                kept = torch.tensor(left, device=mask.device)
                cache.reorder_cache(kept)  # unlike batch_select_indices, all kinds of layers have it
                new, mask, position, rows = new[kept], mask[kept], position[kept], [rows[at] for at in left]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            out = self.model(
                input_ids=new[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            # rows that are done go on to be computed: beyond the context, dynamic RoPE would change the others' frequencies
            position = (position + 1).clamp(max=self.context - 1)

    def describe(self) -> dict[str, Any]:
        return {"device": str(self.model.device)}

    def state(self) -> dict[str, Any]:
        """`batch_size_fits`, what "auto" would take, is there only on a GPU where that is more; `capture_error` only where capturing failed."""
        larger = {"batch_size_fits": self.fits} if self.fits and self.fits > self.batch_size else {}
        failed = {"capture_error": self.capture_error} if self.capture_error else {}
        return {"batch_size_used": self.batch_size, "batches_halved": self.halved, **larger, **failed}

    def restore(self, state: dict[str, Any]) -> None:
        self.batch_size, self.halved, self.fits = state["batch_size_used"], state["batches_halved"], state.get("batch_size_fits")
        if reason := state.get("capture_error"):
            self.capture_error, self._captured = reason, None

    def forget(self) -> None: ...  # nothing of a batch is kept

    def close(self) -> None: ...


def chances_by_row(steps: Sequence[tuple[list[int], Any]], lengths: Sequence[int]) -> list[list[Chance]]:
    """Each row's chances, as many as it has tokens, from those of each step: [rows that were in the batch, 2]."""
    import torch

    chances: list[list[Chance]] = [[] for _ in lengths]
    fetched = iter(torch.cat([sure for _, sure in steps]).tolist())
    for rows, _ in steps:
        for row, (logprob, margin) in zip(rows, fetched, strict=False):  # `rows` ends first: the fetched ones of the next step stay
            if len(chances[row]) < lengths[row]:
                chances[row].append((logprob, margin))
    return chances


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this is what an error comes from: a failed capture raises one of its own over it."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "not enough memory" in str(error)):
            return True
        error = error.__context__
    return False


def cache_bytes(model: Any) -> tuple[int, int]:
    """(of each token, of each row) what a model keeps: keys and values, and the states of layers without them; in bytes."""
    tokens = rows = 0
    for layer in one_token_cache(model).layers:
        kept = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tokens += sum(part.nbytes for part in kept if part is not None)
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        rows += sum(part.nbytes for part in states if part is not None)
    return tokens, rows


def fitting_batch(model: Any, prompts: Sequence[Prompt]) -> int:
    """The largest power of two of rows, at most LARGEST_BATCH, whose caches take half of the free memory; 8 on a CPU."""
    import torch

    if model.device.type != "cuda":
        return 8
    length = max(len(prompt.tokens) + prompt.limit for prompt in prompts)
    length = -(-length // CACHE_ROUND) * CACHE_ROUND
    a_token, a_row = cache_bytes(model)
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    rows = int(free / 2 / (length * a_token + a_row))
    return min(LARGEST_BATCH, 1 << max(0, rows.bit_length() - 1))
