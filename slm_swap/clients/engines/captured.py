"""Decoding by CUDA graphs: a batch's step captured once and replayed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from slm_swap.clients.architecture import fixed_length, text_config
from slm_swap.clients.engines import Chance
from slm_swap.clients.engines.masks import Masks, host_bits, masked
from slm_swap.clients.engines.norms import fused_norms, plain_norms
from slm_swap.common.errors import UserError

CACHE_ROUND = 256  # and static caches to a multiple of this one
CHECK_EVERY = 4  # captured steps between two looks at who has finished: each look stops the GPU for a moment
FEWEST = 8  # rows of a step: a step of fewer takes as long
HOST_ROPE = {"longrope", "dynamic"}  # rotary embeddings whose factors are chosen by the longest position
PREFILL_TOKENS = 16_384  # of a captured batch's prompts at a time

Row = tuple[list[int], list[Chance]]  # a row's new tokens, the one that ended it included, and their chances
Looked = tuple[list[list[int]], list[list[list[float]]], list[int]]  # each row's tokens since the last look, their chances, and how many it may still get


def positions_of(mask: Any) -> Any:
    """Each token's place in its own prompt; padding on the left is at 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def chances_of(logits: Any, chosen: Any) -> Any:
    """Each row's `Chance` of its chosen token, as float32 [rows, 2]. logits: [rows, vocabulary], of any precision; chosen: [rows].

    All of it stays on the device, and nothing waits for it.
    """
    import torch

    logits = logits.float()
    best, place = logits.max(-1, keepdim=True)
    logprobs = logits.gather(-1, chosen[:, None]) - logits.logsumexp(-1, keepdim=True)
    second = logits.scatter(-1, place, -torch.inf).amax(-1, keepdim=True)  # not by topk, which searches a row by one block on a GPU (by reading)
    return torch.cat([logprobs, best - second], -1)


def choose(logits: Any, bits: Any = None) -> tuple[Any, Any]:
    """Each row's best token of those that `bits` allow, [rows], and its chance, [rows, 2]. logits: [rows, vocabulary]; bits: [rows, words] or None."""
    if logits.is_cuda and (kernels := _kernels(logits.device)):
        return kernels.choose(logits.contiguous(), bits)
    chosen = (logits if bits is None else masked(logits, bits)).argmax(-1)
    return chosen, chances_of(logits, chosen)


@cache
def _kernels(device: Any) -> Any:
    """The module `choice_kernels`, tried on a GPU once; None where its kernels cannot be had there, and a step takes a little longer."""
    import torch

    try:
        from slm_swap.clients.engines import choice_kernels

        for bits in (None, torch.ones(1, 1, dtype=torch.int32, device=device)):
            choice_kernels.choose(torch.zeros(1, 32, dtype=torch.bfloat16, device=device), bits)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception:  # no triton, a GPU that it does not know, no C compiler for its launcher
        return None
    return choice_kernels


def one_token_cache(model: Any) -> Any:
    """What a model keeps of a prompt of one token: the shapes of its caches, whatever its configuration calls them."""
    import torch

    with torch.inference_mode():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        return cache_of(model, model(input_ids=token, use_cache=True, logits_to_keep=1))


def cache_of(model: Any, out: Any) -> Any:
    """The cache in a model's output.

    Raises:
        UserError: the model keeps what it has read in a way of its own (Mamba, RecurrentGemma).
    """
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise UserError(f"the transformers engine cannot run {model.config.model_type} models, which give no cache of transformers: use --engine vllm")
    return cache


def can_capture(model: Any) -> bool:
    """Whether a decode step can be replayed from a CUDA graph: its cache is a plain one, and nothing is decided on the host."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if model.device.type != "cuda" or model.config._attn_implementation == "eager":
        return False
    spread = len(set(getattr(model, "hf_device_map", {0: 0}).values())) > 1
    config = text_config(model.config)
    try:
        layers = StaticCache(config=config, max_cache_len=8).layers
    except KeyError:  # a type of layer that has no static form
        return False
    plain = len(layers) == config.num_hidden_layers and all(
        type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers
    )
    return plain and not spread


@dataclass
class Step:
    """A captured decode step of `rows` rows over caches of `length` tokens, with the tensors that it reads and writes."""

    cache: Any
    tokens: Any  # [rows, 1], the last token of each row
    position: Any  # [rows, 1], its place in its own row
    mask: Any  # [rows, 1, 1, length], what is added to a cache slot's score: 0, or the type's least number. Of booleans, each layer would make one anew
    slot: Any  # [1], where in the cache the last token goes
    left: Any  # [rows], tokens that a row may still get; 0: it is done
    made: Any  # [rows, CHECK_EVERY], the tokens since the last look
    chances: Any  # [rows, CHECK_EVERY, 2], theirs
    at: Any  # [1], the column of `made` and `chances` that is written next
    graph: Any = None
    # Of rows with a grammar, whose step has two halves: the host says in between which tokens may come next.
    forward: Any = None  # the first half's graph
    logits: Any = None  # [rows, vocabulary], what it gives
    host_bits: Any = None  # the host's answer, as of `masks.host_bits`
    bits: Any = None  # and on the device
    choice: Any = None  # the second half's graph
    told: Any = None  # [rows, 4], float64: each row's token, its chance and what is left to it
    host_told: Any = None  # what the host reads at once
    ahead: bool = False  # whether the next step's first half is under way

    def too_many(self, left: int) -> bool:
        """Whether a smaller step would do for the rows that are left."""
        return FEWEST < len(self.tokens) >= 2 * left


class CapturedDecoder:
    """Decoding by replaying CUDA graphs; all caches share one storage, and all graphs one memory pool."""

    def __init__(self, model: Any, ends: set[int]):
        self.model, self.ends = model, ends
        # Windows are not looked at here, and LongRoPE and dynamic RoPE choose their factors on the host by the longest position.
        self.longest = fixed_length(model.config)
        self._norms = plain_norms(model)
        self._side: Any = None  # the stream on which work is done before it is captured
        self._shapes: list[tuple[int, int, int]] = []  # each layer's key-value heads, and the sizes of a key and of a value
        self.clear()

    def clear(self) -> None:
        """Forget all graphs and caches."""
        self._steps: dict[tuple[int, int], Step] = {}
        self._storage: list[tuple[Any, Any]] = []  # each layer's keys and values
        self._storage_tokens = 0
        self._pool = None

    def fits(self, length: int) -> bool:
        return self.longest is None or length + CHECK_EVERY <= self.longest

    def decode(self, ids: Any, mask: Any, limits: list[int], masks: Masks | None = None) -> list[Row]:
        """`_decode`, by faster norms."""
        with fused_norms(self._norms):
            return self._decode(ids, mask, limits, masks)

    def _decode(self, ids: Any, mask: Any, limits: list[int], masks: Masks | None = None) -> list[Row]:
        """The new tokens of each row, the one that ended it included, and their chances. ids, mask: [rows, width].

        With `masks` a step has two graphs, as the host has to see each token before it knows which may follow. The device goes on with the next
        step's first half meanwhile, in vain only where all rows were done.
        """
        import torch

        rows, width = ids.shape
        length = -(-(width + max(limits) + CHECK_EVERY) // CACHE_ROUND) * CACHE_ROUND
        step = self._prepare(1 << (rows - 1).bit_length(), length)
        first, sure = self._prefill(step, ids, mask, masks)
        tokens, chances = [[token] for token in first.tolist()], [[tuple(chance)] for chance in sure.tolist()]
        for row, (token,) in enumerate(tokens if masks else ()):
            masks.take(row, token, token in self.ends or limits[row] == 1)
        left = torch.tensor(limits, device=ids.device) - 1
        left[torch.isin(first, torch.tensor(sorted(self.ends), device=ids.device))] = 0
        step.left.zero_()
        step.left[:rows] = left
        step.tokens.zero_()
        step.tokens[:rows, 0] = first
        step.position.zero_()
        step.position[:rows, 0] = mask.sum(1)
        step.mask.fill_(torch.finfo(step.mask.dtype).min)
        step.mask[:rows, 0, 0, :width].masked_fill_(mask.bool(), 0)
        step.mask[:, :, :, width] = 0  # also in rows that stand for nothing: a softmax over no slot is NaN
        step.slot.fill_(width)
        step.ahead = False
        names, still = list(range(rows)), left.tolist()  # which prompt each row of the step is, and how many tokens it may still get
        while any(still):
            if masks:
                shrunk = step.too_many(sum(map(bool, still)))  # before the next one
                made, sure, still = self._run_masked(step, masks, names, ahead=max(still) > 1 and not shrunk)
            else:
                made, sure, still = self._run(step)
            for at, name in enumerate(names):
                had = len(tokens[name])
                take(tokens[name], made[at], limits[name], self.ends)
                chances[name] += map(tuple, sure[at][: len(tokens[name]) - had])
                if masks and len(tokens[name]) > had:
                    masks.take(name, tokens[name][-1], not still[at])
            kept = [at for at in range(len(names)) if still[at]]
            if not kept:
                break
            if step.too_many(len(kept)) and not step.ahead:
                step, names = self._shrink(step, kept), [names[at] for at in kept]
                still = [still[at] for at in kept]
        return list(zip(tokens, chances, strict=True))

    def _prefill(self, step: Step, ids: Any, mask: Any, masks: Masks | None) -> tuple[Any, Any]:
        """Fill the step's cache with the prompts, some rows at a time; gives each row's first new token, [rows], and its chance, [rows, 2]."""
        import torch

        rows, width = ids.shape
        size, first, chances = max(1, PREFILL_TOKENS // width), [], []
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            out = self.model(
                input_ids=ids[part],
                attention_mask=mask[part],
                position_ids=positions_of(mask[part]),
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1]
            first.append((masks.apply(logits, range(part.start, part.stop)) if masks else logits).argmax(-1))
            chances.append(chances_of(logits, first[-1]))
            for static, grown in zip(step.cache.layers, out.past_key_values.layers, strict=True):
                static.keys[part, :, :width] = grown.keys
                static.values[part, :, :width] = grown.values
        for layer in step.cache.layers:
            set_length(layer, width)
        return torch.cat(first), torch.cat(chances)

    def _prepare(self, rows: int, length: int) -> Step:
        """The step of that shape, not captured yet."""
        import torch

        if (rows, length) in self._steps:
            return self._steps[rows, length]
        device = self.model.device
        slot = torch.zeros(1, dtype=torch.long, device=device)
        step = Step(
            cache=self._cache(rows, length, slot),
            tokens=torch.zeros(rows, 1, dtype=torch.long, device=device),
            position=torch.zeros(rows, 1, dtype=torch.long, device=device),
            mask=torch.zeros(rows, 1, 1, length, dtype=self.model.dtype, device=device),
            slot=slot,
            left=torch.zeros(rows, dtype=torch.long, device=device),
            made=torch.zeros(rows, CHECK_EVERY, dtype=torch.long, device=device),
            chances=torch.zeros(rows, CHECK_EVERY, 2, device=device),
            at=torch.zeros(1, dtype=torch.long, device=device),
        )
        self._steps[rows, length] = step
        return step

    def _cache(self, rows: int, length: int, slot: Any) -> Any:
        """A static cache over the shared storage, which grows where it is too small (and then all graphs are void).

        Its plain layers put a token into the `slot`, [1]. Only the first one counts them, as the model asks it for their number.
        """
        import torch
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        if not self._shapes:  # once: a configuration has many names for them
            layers = one_token_cache(self.model).layers
            self._shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
        tokens = rows * length
        if self._storage_tokens < tokens:
            self.clear()
            options = {"dtype": self.model.dtype, "device": self.model.device}
            self._storage = [
                tuple(torch.zeros(tokens * heads * size, **options) for size in sizes) for heads, *sizes in self._shapes
            ]
            self._storage_tokens = tokens
        cache = StaticCache(config=text_config(self.model.config), max_cache_len=length)
        for layer, storage, (heads, *sizes) in zip(cache.layers, self._storage, self._shapes, strict=True):
            one = (flat[: heads * size].view(1, heads, 1, size) for flat, size in zip(storage, sizes, strict=True))
            layer.lazy_initialization(*one)
            layer.batch_size = rows
            layer.keys, layer.values = (
                flat[: tokens * heads * size].view(rows, heads, length, size) for flat, size in zip(storage, sizes, strict=True)
            )
        for layer in cache.layers[1:]:
            if type(layer) is StaticLayer:
                layer.update = partial(put, layer, slot)
        return cache

    def _run(self, step: Step) -> Looked:
        """CHECK_EVERY steps."""
        step.at.zero_()
        if step.graph is None:
            step.graph = self._capture(lambda: self._step(step), CHECK_EVERY)
        else:
            for _ in range(CHECK_EVERY):
                step.graph.replay()
        return step.made.tolist(), step.chances.tolist(), step.left.tolist()

    def _run_masked(self, step: Step, masks: Masks, names: list[int], ahead: bool) -> Looked:
        """One step, each row's token one of those that its grammar allows; `ahead`: the next one is begun before the host looks."""
        import torch

        if not step.ahead:
            self._run_forward(step)
        masks.fill(step.host_bits, names)  # while the device is at work
        step.bits.copy_(step.host_bits, non_blocking=True)
        if step.choice is None:
            step.choice = self._capture(lambda: self._choose(step), 1)
        else:
            step.choice.replay()
        step.host_told.copy_(step.told, non_blocking=True)
        looked = torch.cuda.Event() if step.told.is_cuda else None
        if looked:
            looked.record()
        step.ahead = ahead
        if ahead:
            self._run_forward(step)
        if looked:
            looked.synchronize()
        told = step.host_told.tolist()
        return [[int(token)] for token, *_ in told], [[chance] for _, *chance, _ in told], [int(left) for *_, left in told]

    def _run_forward(self, step: Step) -> None:
        """The first half of a step: the model's part."""
        import torch

        if step.forward is not None:
            step.forward.replay()
            return
        step.forward = self._capture(lambda: self._forward(step), 1)
        step.host_bits = host_bits(len(step.tokens), step.logits)
        step.bits = step.host_bits.to(step.logits.device)
        step.told = torch.zeros(len(step.tokens), 4, dtype=torch.float64, device=step.logits.device)
        step.host_told = torch.zeros(len(step.tokens), 4, dtype=torch.float64, pin_memory=step.told.is_cuda)

    def _capture(self, work: Callable[[], None], times: int) -> Any:
        """A graph of some work. It is done so many times before, as usual: that also sets up what must not be set up while capturing."""
        import torch

        stream = self._side = self._side or torch.cuda.Stream()  # one for all: cuBLAS keeps a workspace for each
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # The inner context does not leave its stream where capturing fails: this one does.
        with torch.cuda.stream(torch.cuda.current_stream()), fixed_rope(self.model), torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def _step(self, step: Step) -> None:
        """One token for every row; all of it on the device."""
        self._advance(step, *choose(self._next_logits(step)))

    def _forward(self, step: Step) -> None:
        logits = self._next_logits(step)
        if step.logits is None:
            step.logits = logits.clone()  # where the graph writes them too
        step.logits.copy_(logits)

    def _choose(self, step: Step) -> None:
        import torch

        step.at.zero_()
        self._advance(step, *choose(step.logits, step.bits))
        step.told.copy_(torch.cat([step.tokens.double(), step.chances[:, 0], step.left[:, None]], 1))

    def _next_logits(self, step: Step) -> Any:
        """[rows, vocabulary]"""
        out = self.model(
            input_ids=step.tokens,
            attention_mask=step.mask,
            position_ids=step.position,
            past_key_values=step.cache,
            use_cache=True,
        )
        return out.logits[:, -1]

    def _advance(self, step: Step, new: Any, chances: Any) -> None:
        """Add each row's new token, [rows], and its chance, [rows, 2]."""
        step.made.index_copy_(1, step.at, new[:, None])
        step.chances.index_copy_(1, step.at, chances[:, None])
        step.left.sub_(1).clamp_(min=0)
        for end in self.ends:
            step.left.masked_fill_(new == end, 0)
        step.tokens.copy_(new[:, None])
        step.position.add_(1)
        step.slot.add_(1)
        step.mask.index_fill_(3, step.slot, 0)
        step.at.add_(1)

    def _shrink(self, step: Step, kept: list[int]) -> Step:
        """The step of half as many rows (or fewer), with the rows that are not done."""
        import torch

        length = step.mask.shape[3]
        smaller = self._prepare(max(FEWEST, 1 << (len(kept) - 1).bit_length()), length)
        index = torch.tensor(kept, device=step.tokens.device)
        for name in ("tokens", "position", "mask", "left"):
            old, new = getattr(step, name), getattr(smaller, name)
            new.fill_(torch.finfo(new.dtype).min if name == "mask" else 0)
            new[: len(kept)] = old[index]
        smaller.ahead = False
        smaller.slot.copy_(step.slot)
        smaller.mask.index_fill_(3, step.slot, 0)
        used = int(step.slot)
        for old, new in zip(step.cache.layers, smaller.cache.layers, strict=True):
            keys, values = old.keys[index, :, :used], old.values[index, :, :used]  # copies: the storage is the same
            new.keys[: len(kept), :, :used] = keys
            new.values[: len(kept), :, :used] = values
            set_length(new, used)
        return smaller


def take(tokens: list[int], made: list[int], limit: int, ends: set[int]) -> None:
    """Add what was made to a row's tokens, up to its end or limit."""
    for token in made:
        if len(tokens) == limit or tokens[-1] in ends:
            return
        tokens.append(token)


def put(layer: Any, slot: Any, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    """In place of a static layer's `update`: the keys and values, [rows, heads, 1, size], of a token that goes into `slot`, [1]."""
    return layer.keys.index_copy_(2, slot, keys), layer.values.index_copy_(2, slot, values)


def set_length(layer: Any, length: int) -> None:
    """Tell a static cache's layer how many tokens it holds."""
    layer.cumulative_length.fill_(length)
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = length


@contextmanager
def fixed_rope(model: Any) -> Iterator[None]:
    """Rotary embeddings that do not look at the positions on the host (LongRoPE and dynamic RoPE do, to choose their factors)."""
    modules = [module for module in model.modules() if HOST_ROPE & set(rope_types(module))]
    for module in modules:
        module.forward = type(module).forward.__wrapped__.__wrapped__.__get__(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def rope_types(module: Any) -> Iterable[str]:
    """Those of a rotary embedding: one, or one for each type of layer; of any other module, none."""
    given = getattr(module, "rope_type", None)
    return given.values() if isinstance(given, dict) else [given]
