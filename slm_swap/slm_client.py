"""The local small model: loading it, and asking it through one of the engines."""

import gc
import json
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from slm_swap.clients.confidence import confidence
from slm_swap.clients.engines import Engine, Generated, Prompt, Workload, choose_engine
from slm_swap.clients.grammar import NoGrammar
from slm_swap.clients.loading import (
    BackgroundHashes,
    adapter_path,
    count_tokens,
    encode_prompt,
    encode_prompts,
    load_model,
    load_tokenizer,
    model_path,
    placement,
    prompt_text,
    require_base,
    require_numbers,
    require_undamaged,
    trained_base,
    training_seconds,
    with_adapter,
)
from slm_swap.clients.native import CannotShow, chat_format, read_reply, uses_tools
from slm_swap.clients.pricing import load_prices, to_float
from slm_swap.clients.protocol import Client, Reply
from slm_swap.clients.reply_forms import row_grammar
from slm_swap.clients.templates import particulars
from slm_swap.clients.thinking import thinking as thinking_of
from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file
from slm_swap.common.seeds import set_seed
from slm_swap.common.settings import Settings, display_path, shown_path
from slm_swap.rows.prompts import Request
from slm_swap.scoring.json_values import parse_json
from slm_swap.scoring.replies import native_calls, parse_calls, parse_structured, parse_toolcall, tries_to_call

ENCODED_AT_ONCE = 64  # rows: most of what the cores gain, and short enough not to keep the GPU waiting


def measure_workload(tokenizer: Any, rows: Iterable[Request], max_new_tokens: int) -> Workload:
    """How many rows there are, and how many tokens the longest prompt has with its reply."""
    count = longest = 0
    for request in rows:
        count += 1
        with suppress(CannotShow):  # such a row is never asked
            # A token is a byte or more, and the template of a text request adds fewer than 64.
            shown = [prompt_text(tokenizer, request)] if request.native else [message["content"] for message in request.messages]
            if sum(len(text.encode("utf-8", "replace")) for text in shown) > longest - 64:
                longest = max(longest, len(encode_prompt(tokenizer, request)))
    return Workload(count, longest + max_new_tokens)


def checked(rows: Iterable[Request], tokenizer: Callable[[], Any]) -> Iterable[Request]:
    """The rows, once the chat template is known to show what the first of them need.

    Raises:
        UserError: it is not: see `native.ChatFormat`.
    """
    coming = iter(rows)
    first = list(islice(coming, ENCODED_AT_ONCE))
    if any(request.native and uses_tools(request) for request in first):
        chat_format(tokenizer())
    return chain(first, coming)


def taken_at_once(rows: Iterable[Any], size: int) -> Iterator[list[Any] | None]:
    """The rows in lists of at most `size`; a None among them ends a list, and is given behind it."""
    taken: list[Any] = []
    for row in rows:
        if row is not None:
            taken.append(row)
        if taken and (row is None or len(taken) == size):
            yield taken
            taken = []
        if row is None:
            yield None
    if taken:
        yield taken


def in_form(request: Request, reply: Reply) -> bool:
    """Whether a reply is of the form that was asked for, and need not be made again under a grammar.

    It is not where the limit cut it, where it is no valid JSON or not the calls that are wanted, and where it names a tool that is not on
    offer. Values that break a schema are no matter of form: they are the model's answer.
    """
    wanted, text, calls = request.wanted, reply.text, reply.calls
    if reply.finish_reason != "stop":
        return False
    if wanted is None:
        return True
    try:
        if wanted.form not in ("call", "calls"):
            of_object = wanted.form == "object" and not request.native and (wanted.schema or {}).get("type", "object") == "object"
            parse_structured(text) if of_object else parse_json(text)
            return True
        if wanted.form == "call":
            made = native_calls(calls) if calls is not None else (parse_toolcall(text),)
        else:
            made = native_calls(calls) if calls is not None else parse_calls(text)
    except ValueError:
        return False
    if not made:
        return wanted.form == "calls" and wanted.choice != "required" and bool(text.strip()) and not tries_to_call(text)
    offered = {tool["name"] for tool in wanted.tools or ()}
    return (wanted.form == "calls" or len(made) == 1) and all(call.name in offered or not offered for call in made)


def made_again(free: Reply, bound: Reply) -> Reply:
    """The reply under a grammar in place of the free one, at the tokens and seconds of both; what else the free one tells of the model stays."""
    thought = [count for count in (free.reasoning_tokens, bound.reasoning_tokens) if count is not None]
    return replace(
        free, text=bound.text, calls=bound.calls, finish_reason=bound.finish_reason, output_tokens=free.output_tokens + bound.output_tokens,
        seconds=free.seconds + bound.seconds, reasoning_tokens=sum(thought) if thought else None,
    )  # fmt: skip


class SLMClient:
    """The local model: greedy decoding by one of `engines.ENGINES`, only the new tokens decoded.

    The same rows give the same replies whatever the engine and the batch size, up to numeric ties. A prompt that leaves no room in
    the context gives a `prompt_too_long` reply instead of being cut.

    Args:
        precision: one of the engine's `engines.PRECISIONS`; None takes its first ("int8" is LLM.int8(), the documented setting).
        adapter: folder of a PEFT adapter.
        batch_size: rows in one batch of the transformers engine, or "auto".
        workload: what vLLM is started for.
        tokenizer: the checkpoint's, where it is loaded already, with that `thinking`.
        hashes: those of the checkpoint's and the adapter's folder, where they are being made already.
        thinking: whether prompts ask for thinking: see `thinking.use_thinking`.
        constrain: one of engines.CONSTRAINTS. "always" decodes each reply under the grammar of what may be replied: see `grammar`. "retry" decodes
            freely, and again under the grammar where a reply is not `in_form`: all others stay as they are. A row that no grammar
            describes is asked freely, and its reply says so.
        apart: vLLM runs in a process of its own, which prompts and replies then do not hold up.

    Raises:
        UserError: no checkpoint or adapter, one that does not fit the other, an engine that cannot run here, or prices that
            cannot be read.
    """

    kind = "slm"

    def __init__(
        self,
        settings: Settings,
        model: str | Path | None = None,
        precision: str | None = None,
        adapter: str | Path | None = None,
        max_new_tokens: int = 256,
        batch_size: int | str = 8,
        trust_remote_code: bool = False,
        engine: str = "auto",
        engine_start: str = "auto",
        workload: Workload | None = None,
        tokenizer: Any = None,
        thinking: str | None = None,
        constrain: str = "off",
        hashes: BackgroundHashes | None = None,
        apart: bool = False,
    ):
        self.constrain, self.grammars = constrain, None
        self.max_new_tokens = max_new_tokens
        self.prices = load_prices(settings.prices_file)
        self.path, self.adapter = model_path(settings, model), adapter_path(adapter)
        name, self.precision = choose_engine(engine, precision)
        self.training_seconds = training_seconds(self.adapter or self.path)
        started = time.perf_counter()
        folders = [self.path, *([self.adapter] if self.adapter else [])]
        with hashes or BackgroundHashes(folders) as hashes:
            self.tokenizer = tokenizer or load_tokenizer(self.path, trust_remote_code, thinking)
            if constrain != "off":
                from slm_swap.clients.engines.masks import Grammars

                self.grammars = Grammars(self.tokenizer)
            self._load(name, batch_size, trust_remote_code, engine_start, workload, settings.launch.world, apart)
            self._files_sha256 = hashes.result()
        for folder, files_sha256 in zip(folders, self._files_sha256, strict=True):
            require_undamaged(folder, files_sha256)
        if self.adapter:
            own = "put its base there" if model else "set SLM_MODEL_PATH to its base"
            require_base(self.adapter, self.path, self._files_sha256[0], f"{own}, or train it again on this model")
        base = trained_base(self.adapter or self.path)
        self.trained = {"trained_on_sha256": base} if self.adapter or base else {}
        self.warning = None
        if self.adapter and base is None:
            self.warning = f"{shown_path(self.adapter)} has no training_info.json that names its base by hash: that it was trained on {shown_path(self.path)} is not proven"
        self.load_seconds = time.perf_counter() - started

    def _load(
        self,
        name: str,
        batch_size: int | str,
        trust_remote_code: bool,
        engine_start: str,
        workload: Workload | None,
        processes: int,
        apart: bool,
    ) -> None:
        if name == "vllm":
            from slm_swap.clients.engines.apart import EngineApart
            from slm_swap.clients.engines.vllm_engine import VllmEngine

            constrained = self.grammars is not None
            make = partial(VllmEngine, self.path, self.precision, self.adapter, engine_start, workload, trust_remote_code, self.tokenizer, constrained)
            self.engine: Engine = EngineApart(make) if apart else make()
            self._parameters = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        else:
            from slm_swap.clients.engines.transformers_engine import TransformersEngine

            loaded = load_model(self.path, self.precision, placement(self.path, self.precision, processes), trust_remote_code)
            if self.precision == "int8":
                from slm_swap.clients.int8 import give_own_products

                give_own_products(loaded)  # LLM.int8()'s stop for the host at each product, and depend on what else is in the batch
            if self.adapter:
                loaded = with_adapter(loaded, self.adapter, self.path)
            require_numbers(self.adapter or self.path, loaded.eval())
            self.engine = TransformersEngine(loaded, self.tokenizer, batch_size, grammars=self.grammars)
            self._parameters = {"max_new_tokens": self.max_new_tokens, "batch_size": batch_size, "do_sample": False}

    def generate(self, batch: list[Request]) -> list[Reply]:
        """Replies in the rows' order."""
        replies = dict(self.stream(enumerate(batch)))
        return [replies[index] for index in range(len(batch))]

    def stream(self, rows: Iterable[tuple[int, Request] | None], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        """As of `protocol.Client`. For vLLM a None among the rows says that no other one waits now: those that came are asked at once."""
        asked: dict[int, tuple[Prompt, Request]] = {}
        free: dict[int, Reply] = {}  # what was made again
        why: dict[int, str] = {}
        refused: list[tuple[int, Reply]] = []

        def bound(prompt: Prompt, request: Request) -> Prompt | None:
            """The prompt with its row's grammar; None where there is none."""
            try:
                grammar = self._grammar(request)
                error = self.grammars.why_not(grammar)
            except NoGrammar as reason:
                error = str(reason)
            if error is None:
                return replace(prompt, grammar=grammar, again=None)
            if prompt.index not in answered:
                why[prompt.index] = error
            return None

        def again(prompt: Prompt, request: Request) -> Callable[[Generated], Prompt | None]:
            def look(made: Generated) -> Prompt | None:
                reply = self._reply(prompt, request, made)
                other = None if in_form(request, reply) else bound(prompt, request)
                if other and prompt.index not in answered:
                    free[prompt.index] = reply
                return other

            return look

        def prompts() -> Iterator[Prompt | None]:
            for taken in taken_at_once(rows, ENCODED_AT_ONCE):
                if taken is None:
                    yield None
                    continue
                chunk = dict(taken)
                for (index, request), tokens in zip(chunk.items(), self._encode(list(chunk.values())), strict=True):
                    if isinstance(tokens, CannotShow):
                        if index not in answered:
                            refused.append((index, Reply("", "error", error=str(tokens))))
                        continue
                    room = self.engine.context - len(tokens)
                    if room > 0:
                        prompt = Prompt(index, tokens, min(self.max_new_tokens, room))
                        if self.constrain == "always":
                            prompt = bound(prompt, request) or prompt
                        elif self.constrain == "retry":
                            prompt = replace(prompt, again=again(prompt, request))
                        if index not in answered:
                            asked[index] = prompt, request
                        yield prompt
                    elif index not in answered:
                        error = f"the prompt has {len(tokens)} tokens, the context {self.engine.context}"
                        refused.append((index, Reply("", "prompt_too_long", len(tokens), 0, 0, error=error)))

        for made in self.engine.generate(prompts(), answered):
            if made is None:
                yield from refused
                refused.clear()
                continue
            prompt, request = asked.pop(made.index)
            reply = self._reply(prompt, request, made)
            if self.constrain != "off":
                told = free.pop(made.index, None)
                constrained = prompt.grammar is not None or told is not None
                reply = replace(made_again(told, reply) if told else reply, constrained=constrained, grammar_error=why.pop(made.index, None))
            yield made.index, reply
            yield from refused
            refused.clear()
        yield from refused

    def _grammar(self, request: Request) -> str:
        """`row_grammar`, written once for all rows that want the same.

        Raises:
            NoGrammar: there is none.
        """
        wanted = json.dumps([request.wanted, request.native, uses_tools(request)])
        return self.grammars.text(wanted, lambda: row_grammar(self.tokenizer, request, self.engine.ends, self.grammars.special))

    def _encode(self, requests: list[Request]) -> list[list[int] | CannotShow]:
        """The tokens of each prompt, or why the chat template cannot show it."""
        try:
            return encode_prompts(self.tokenizer, requests)
        except CannotShow as error:
            if len(requests) == 1:
                return [error]
        return [told for request in requests for told in self._encode([request])]

    def _reply(self, prompt: Prompt, request: Request, made: Generated) -> Reply:
        text, calls, thinking = read = read_reply(self.tokenizer, request, made.tokens, made.stopped)
        spent = len(made.tokens) + made.stopped  # the end token was generated too
        reason = "stop" if made.stopped else "length"
        thought = self.count_tokens(thinking) if thinking else None
        return Reply(
            text, reason, len(prompt.tokens), spent, made.cached, made.seconds,
            batch=made.batch, limit=prompt.limit, reasoning_tokens=thought, calls=calls,
            confidence=confidence(self.tokenizer, request, made.tokens, made.chances, read),
        )  # fmt: skip

    def count_tokens(self, text: str) -> int | None:
        return count_tokens(self.tokenizer, text)

    def forget(self) -> None:
        self.engine.forget()

    @cached_property
    def _told(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "path": display_path(self.path),
            "config_sha256": sha256_file(self.path / "config.json"),
            "precision": self.precision,
            "engine": self.engine.name,
            "adapter": display_path(self.adapter) if self.adapter else None,
            "training_seconds": self.training_seconds,
            "parameters": self._parameters,
            **particulars(self.tokenizer),
            **({"thinking": asked} if (asked := thinking_of(self.tokenizer)) else {}),
            **({"constrain": self.constrain} if self.grammars else {}),
            **({"products": "bf16"} if self.precision == "int8" else {}),  # reports without it are of LLM.int8()
            **self.engine.describe(),
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self._told | {"files_sha256": self._files_sha256}

    def state(self) -> dict[str, Any]:
        return self.engine.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.engine.restore(state)

    def describe(self) -> dict[str, Any]:
        return self.identity | self.trained | self.state()

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """The machine's price an hour times the seconds that it worked."""
        return to_float(self.prices.local.cost(seconds))

    def close(self) -> None:
        self.engine.close()


def begin_hashing(settings: Settings, options: Mapping[str, Any]) -> BackgroundHashes | None:
    """The hashes for an `SLMClient` with these options; None where it will refuse a folder, which it does in its turn."""
    with suppress(UserError):
        adapter = adapter_path(options.get("adapter"))
        return BackgroundHashes([model_path(settings, options.get("model")), *([adapter] if adapter else [])])
    return None


@contextmanager
def no_collections() -> Iterator[None]:
    """Without garbage collections, which find next to nothing while packages and a model are loaded, and take a seventh of that time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_collections()
def local_client(settings: Settings, rows: Iterable[Request], max_new_tokens: int, seed: int, **options: Any) -> Client:
    """The local model for those rows: here, or in all processes of a launch where this is the first one.

    Raises:
        UserError: as `SLMClient`.
    """
    hashes = begin_hashing(settings, options) if settings.launch.world == 1 else None  # before torch is imported, which takes seconds
    with hashes or nullcontext():
        return _local_client(settings, rows, max_new_tokens, seed, hashes, **options)


def _local_client(
    settings: Settings, rows: Iterable[Request], max_new_tokens: int, seed: int, hashes: BackgroundHashes | None, **options: Any
) -> Client:
    set_seed(seed)
    engine, _ = choose_engine(options.get("engine", "auto"), options.get("precision"))

    @cache
    def own_tokenizer() -> Any:
        return load_tokenizer(model_path(settings, options.get("model")), options.get("trust_remote_code", False), options.get("thinking"))

    rows, workload = checked(rows, own_tokenizer), None
    if engine == "vllm":
        workload = measure_workload(own_tokenizer(), rows, max_new_tokens)
    if settings.launch.world == 1:
        tokenizer = own_tokenizer() if own_tokenizer.cache_info().currsize else None
        return SLMClient(settings, max_new_tokens=max_new_tokens, workload=workload, tokenizer=tokenizer, hashes=hashes, **options)
    from slm_swap.clients.replicas import open_replicas

    price = load_prices(settings.prices_file).local
    return open_replicas(
        settings.launch, workload, lambda seconds: to_float(price.cost(seconds)), lambda text: count_tokens(own_tokenizer(), text)
    )


def serve_rows(settings: Settings, seed: int, concurrency: int | None = None, **options: Any) -> None:
    """What the processes of a launch that `serves` do until the first one, with its `local_client`, is done.

    `options` are those of `factory.make_client`; `concurrency` has no meaning here.
    """
    from slm_swap.clients.replicas import serve

    @no_collections()
    def make(receive: Callable[[], Workload | None]) -> SLMClient:
        hashes = begin_hashing(settings, options)
        with hashes or nullcontext():
            set_seed(seed)
            engine, _ = choose_engine(options.get("engine", "auto"), options.get("precision"))
            if engine == "vllm":  # while rank 0 looks at the rows
                from slm_swap.clients.engines.vllm_engine import import_vllm

                import_vllm()
            return SLMClient(settings, workload=receive(), hashes=hashes, **options)

    serve(settings.launch, make)
