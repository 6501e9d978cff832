"""Greedy decoding with transformers, in batches of prompts of like length.

A decode step of a small model is bound by launching its kernels, not by arithmetic: on a CUDA GPU the step is captured once for each
shape in a CUDA graph over a static cache and replayed. LLM.int8() looks at its inputs on the host and cannot be captured; there, on
a CPU, and for models whose cache is not a plain one, each step is launched as usual over a cache that grows.
"""

import time
from collections.abc import Container, Generator, Iterable, Sequence
from itertools import islice
from typing import Any

from slm_swap.clients.endings import reply_ends
from slm_swap.clients.engines import Generated, Prompt
from slm_swap.clients.engines.captured import CACHE_ROUND, CapturedDecoder, can_capture, positions_of
from slm_swap.common.errors import UserError

WINDOW = 2048  # prompts that are sorted by length together
ROUND = 32  # prompts are padded to a multiple of it: fewer shapes
LARGEST_BATCH = 256  # what `auto` takes at most: from here on arithmetic binds, not launches


class TransformersEngine:
    """A causal language model and its tokenizer behind `engines.Engine`.

    Args:
        batch_size: prompts in one batch; "auto" takes what fits in the free memory.
        capture: use CUDA graphs where they can be used. They keep memory.

    A batch that does not fit in memory is halved and tried again. Rows leave a batch when they are done: it goes on with the others
    once half have left.
    """

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str = 8, capture: bool = True):
        from slm_swap.clients.engines.attention import use_grouped_attention

        self.model, self.tokenizer = model, tokenizer
        use_grouped_attention(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.context = model.config.max_position_embeddings
        self.ends = reply_ends(tokenizer, model.generation_config.eos_token_id, getattr(model.config, "eos_token_id", None))
        self.batch_size = None if batch_size == "auto" else batch_size
        self.halved = 0
        self._batches = 0
        self._captured = CapturedDecoder(model, self.ends) if capture and can_capture(model) else None

    def generate(self, prompts: Iterable[Prompt], answered: Container[int] = ()) -> Generator[Generated]:
        """Batches are those of all prompts, so that an interrupted run goes on with the batches that it would have had: one
        without an unanswered prompt is left out, and of the others the answered prompts are computed again and not given."""
        prompts = iter(prompts)
        while window := list(islice(prompts, WINDOW)):
            if self.batch_size is None:
                self.batch_size = fitting_batch(self.model, window)
            window.sort(key=lambda prompt: (-len(prompt.tokens), prompt.index))  # the longest first: if it fits, all do
            for start in range(0, len(window), self.batch_size):
                batch = window[start : start + self.batch_size]
                if any(prompt.index not in answered for prompt in batch):
                    made = self._halving(batch, str(self._batches))
                    yield from (one for one in made if one.index not in answered)
                self._batches += 1

    def _halving(self, batch: Sequence[Prompt], name: str) -> list[Generated]:
        import torch

        started = time.perf_counter()
        try:
            rows = self._decode(batch)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                raise
        else:
            seconds = time.perf_counter() - started
            return [self._generated(prompt, tokens, seconds, name) for prompt, tokens in zip(batch, rows, strict=True)]
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

    def _generated(self, prompt: Prompt, tokens: list[int], seconds: float, name: str) -> Generated:
        stopped = tokens[-1] in self.ends
        return Generated(prompt.index, tokens[:-1] if stopped else tokens, stopped, seconds, batch=name)

    def _decode(self, batch: Sequence[Prompt]) -> list[list[int]]:
        """The new tokens of each prompt, the one that ended it included."""
        import torch

        width = -(-max(len(prompt.tokens) for prompt in batch) // ROUND) * ROUND
        width = min(width, self.context - 1)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt.tokens)) + prompt.tokens for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in batch])
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        limits = [prompt.limit for prompt in batch]
        with torch.inference_mode():
            if self._captured and self._captured.fits(width + max(limits)):
                return self._captured.decode(ids, mask, limits)
            return self._step_by_step(ids, mask, limits)

    def _step_by_step(self, ids: Any, mask: Any, limits: list[int]) -> list[list[int]]:
        import torch

        tokens: list[list[int]] = [[] for _ in limits]
        rows = list(range(len(limits)))  # the prompts that are still in the batch
        done = [False] * len(limits)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True, logits_to_keep=1)
        position = mask.sum(1, keepdim=True)
        while True:
            new = out.logits[:, -1].argmax(-1)
            for row, token in zip(rows, new.tolist(), strict=True):
                if not done[row]:
                    tokens[row].append(token)
                    done[row] = token in self.ends or len(tokens[row]) == limits[row]
            if all(done):
                return tokens
            left = [at for at, row in enumerate(rows) if not done[row]]
            if len(left) <= len(rows) // 2:
                kept = torch.tensor(left, device=mask.device)
                out.past_key_values.batch_select_indices(kept)
                new, mask, position, rows = new[kept], mask[kept], position[kept], [rows[at] for at in left]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            out = self.model(
                input_ids=new[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            position = position + 1

    def describe(self) -> dict[str, Any]:
        return {"device": str(self.model.device)}

    def state(self) -> dict[str, Any]:
        return {"batch_size_used": self.batch_size, "batches_halved": self.halved}

    def restore(self, state: dict[str, Any]) -> None:
        self.batch_size, self.halved = state["batch_size_used"], state["batches_halved"]

    def forget(self) -> None: ...  # nothing of a batch is kept

    def close(self) -> None: ...


def bytes_per_token(config: Any, dtype_bytes: int = 2) -> int:
    """Keys and values of one token in all layers."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype_bytes


def fitting_batch(model: Any, prompts: Sequence[Prompt]) -> int:
    """The largest power of two of rows, at most LARGEST_BATCH, whose caches take half of the free memory; 8 on a CPU."""
    import torch

    if model.device.type != "cuda":
        return 8
    length = max(len(prompt.tokens) + prompt.limit for prompt in prompts)
    length = -(-length // CACHE_ROUND) * CACHE_ROUND
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    rows = int(free / 2 / (length * bytes_per_token(model.config, model.dtype.itemsize)))
    return min(LARGEST_BATCH, 1 << max(0, rows.bit_length() - 1))
