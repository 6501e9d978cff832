"""The local small model: loading it, and asking it through one of the engines."""

import gc
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from slm_swap.clients.engines import Engine, Generated, Prompt, Workload, choose_engine
from slm_swap.clients.pricing import load_prices, to_float
from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file
from slm_swap.common.seeds import set_seed
from slm_swap.common.settings import Settings, display_path, find_path
from slm_swap.rows.examples import text_hash
from slm_swap.rows.prompts import Messages

HASH_BLOCK = 16 << 20
ENCODED_AT_ONCE = 64  # rows: most of what the cores gain, and short enough not to keep the GPU waiting
DOWNLOAD = "hf download microsoft/Phi-4-mini-instruct --local-dir slm_swap/models/phi-4-mini"


def model_path(settings: Settings, given: str | Path | None = None) -> Path:
    """The checkpoint's folder: `given`, else SLM_MODEL_PATH, from the checkout's root or from `slm_swap/`.

    Raises:
        UserError: neither is set, or there is no checkpoint.
    """
    wanted = given or settings.slm_model_path
    if not wanted:
        raise UserError(f"SLM_MODEL_PATH is not set: get the model with `{DOWNLOAD}` and set SLM_MODEL_PATH=models/phi-4-mini")
    path = find_path(wanted)
    if not (path / "config.json").is_file():
        raise UserError(f"no checkpoint at {display_path(path)} (no config.json): get it with `{DOWNLOAD}` or set SLM_MODEL_PATH")
    return path


def adapter_path(given: str | Path | None) -> Path | None:
    """An adapter's folder, or None where none is asked for.

    Raises:
        UserError: there is no adapter.
    """
    if given is None:
        return None
    path = find_path(given)
    if not (path / "adapter_config.json").is_file():
        raise UserError(
            f"no adapter at {display_path(path)} (no adapter_config.json): make it with train_unsloth.py or drop --adapter"
        )
    return path


def training_seconds(adapter: Path) -> float | None:
    """How long the making of an adapter took, by its `training_info.json`; None where that does not say."""
    try:
        seconds = json.loads((adapter / "training_info.json").read_text(encoding="utf-8"))["seconds"]["total"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return seconds if isinstance(seconds, (int, float)) and 0 <= seconds < math.inf else None


def quantization(precision: str) -> Any:
    """transformers' quantization config for a precision, None for unquantized weights."""
    import torch
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        quiet_int8()
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
        )
    return None


def quiet_int8() -> None:
    """bitsandbytes would tell at each product of 8-bit weights that it casts to float16: hundreds of lines a row."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def load_model(path: Path, precision: str, device_map: Any = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in one of transformers' precisions: the one loader of evaluation and training.

    Raises:
        UserError: the folder does not hold a model that transformers can load.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
            device_map=device_map,
            quantization_config=quantization(precision),
            trust_remote_code=trust_remote_code,
        )
    except torch.OutOfMemoryError:
        raise UserError(
            f"{display_path(path)} does not fit in memory in {precision}: use --precision nf4 or a larger GPU"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load {display_path(path)} ({_first_line(error)}): check the checkpoint or download it again"
        ) from None


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, padding on the left, with a chat template.

    Raises:
        UserError: there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of {display_path(path)} ({_first_line(error)}): download it again") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {display_path(path)} has no chat template: use an instruct checkpoint")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """The token ids that a model is shown for one row: the same in evaluation and in training."""
    return encode_prompts(tokenizer, [messages])[0]


def encode_prompts(tokenizer: Any, rows: list[Messages]) -> list[list[int]]:
    """`encode_prompt` of several rows, by all cores at once."""
    texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in rows]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def placement(path: Path, precision: str, processes: int = 1) -> Any:
    """transformers' device_map: the first GPU where the model fits on it, so that no layer waits for another GPU's; else "auto".

    Raises:
        UserError: it does not fit, and the other GPUs are other processes'.
    """
    import torch

    if not torch.cuda.is_available():
        return "auto"
    share = {"int8": 0.5, "nf4": 0.3, "fp32": 2.0}.get(precision, 1.0)  # of a checkpoint in 16 bits
    weights = share * sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free = torch.cuda.mem_get_info(0)[0]
    if 1.2 * weights < free:
        return {"": 0}
    if processes > 1:
        raise UserError(
            f"{display_path(path)} needs {1.2 * weights / 2**30:.1f} GiB in {precision} and a GPU has {free / 2**30:.1f} GiB free: "
            "start one process by python, which spreads it over all GPUs, or use --precision nf4"
        )
    return "auto"


def measure_workload(tokenizer: Any, rows: Iterable[Messages], max_new_tokens: int) -> Workload:
    """How many rows there are, and how many tokens the longest prompt has with its reply."""
    count = longest = 0
    for messages in rows:
        count += 1
        if sum(len(message["content"].encode("utf-8", "replace")) for message in messages) > longest - 64:  # a token is a byte or more
            longest = max(longest, len(encode_prompt(tokenizer, messages)))
    return Workload(count, longest + max_new_tokens)


class SLMClient:
    """The local model: greedy decoding by one of `engines.ENGINES`, only the new tokens decoded.

    The same rows give the same replies whatever the engine and the batch size, up to numeric ties. A prompt that leaves no room in
    the context gives a `length` reply instead of being cut.

    Args:
        precision: one of the engine's `engines.PRECISIONS`; None takes its first ("int8" is LLM.int8(), the documented setting).
        adapter: folder of a PEFT adapter.
        batch_size: rows in one batch of the transformers engine, or "auto".
        workload: what vLLM is started for.
        tokenizer: the checkpoint's, where it is loaded already.

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
    ):
        self.max_new_tokens = max_new_tokens
        self.prices = load_prices(settings.prices_file)
        self.path, self.adapter = model_path(settings, model), adapter_path(adapter)
        name, self.precision = choose_engine(engine, precision)
        self.training_seconds = training_seconds(self.adapter or self.path)
        started = time.perf_counter()
        folders = [self.path, *([self.adapter] if self.adapter else [])]
        with ThreadPoolExecutor(1) as background:  # while the model is loaded
            hashes = background.submit(lambda: [files_hash(folder) for folder in folders])
            self.tokenizer = tokenizer or load_tokenizer(self.path, trust_remote_code)
            self._load(name, batch_size, trust_remote_code, engine_start, workload, settings.launch.world)
        self._files_sha256 = hashes.result()
        self.load_seconds = time.perf_counter() - started

    def _load(
        self, name: str, batch_size: int | str, trust_remote_code: bool, engine_start: str, workload: Workload | None, processes: int
    ) -> None:
        if name == "vllm":
            from slm_swap.clients.engines.vllm_engine import VllmEngine

            self.engine: Engine = VllmEngine(self.path, self.precision, self.adapter, engine_start, workload, trust_remote_code)
            self._parameters = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        else:
            from slm_swap.clients.engines.transformers_engine import TransformersEngine

            loaded = load_model(self.path, self.precision, placement(self.path, self.precision, processes), trust_remote_code)
            if self.adapter:
                loaded = with_adapter(loaded, self.adapter, self.path)
            self.engine = TransformersEngine(loaded.eval(), self.tokenizer, batch_size)
            self._parameters = {"max_new_tokens": self.max_new_tokens, "batch_size": batch_size, "do_sample": False}

    def generate(self, batch: list[Messages]) -> list[Reply]:
        """Replies in the rows' order."""
        replies = dict(self.stream(enumerate(batch)))
        return [replies[index] for index in range(len(batch))]

    def stream(self, rows: Iterable[tuple[int, Messages]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        lengths: dict[int, int] = {}
        refused: list[tuple[int, Reply]] = []

        def prompts() -> Iterator[Prompt]:
            coming = iter(rows)
            while chunk := dict(islice(coming, ENCODED_AT_ONCE)):
                for index, tokens in zip(chunk, encode_prompts(self.tokenizer, list(chunk.values())), strict=True):
                    room = self.engine.context - len(tokens)
                    if room > 0:
                        if index not in answered:
                            lengths[index] = len(tokens)
                        yield Prompt(index, tokens, min(self.max_new_tokens, room))
                    elif index not in answered:
                        error = f"the prompt has {len(tokens)} tokens, the context {self.engine.context}"
                        refused.append((index, Reply("", "length", input_tokens=len(tokens), error=error)))

        for made in self.engine.generate(prompts(), answered):
            yield made.index, self._reply(lengths.pop(made.index), made)
            yield from refused
            refused.clear()
        yield from refused

    def _reply(self, length: int, made: Generated) -> Reply:
        text = self.tokenizer.decode(made.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        spent = len(made.tokens) + made.stopped  # the end token was generated too
        reason = "stop" if made.stopped else "length"
        return Reply(text, reason, length, spent, made.cached, made.seconds, batch=made.batch)

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
        return self._told | self.state()

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """The machine's price an hour times the seconds that it worked."""
        return to_float(self.prices.local.cost(seconds))

    def close(self) -> None:
        self.engine.close()


@contextmanager
def no_collections() -> Iterator[None]:
    """Without garbage collections, which find next to nothing while packages and a model are loaded, and take a seventh of that time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_collections()
def local_client(settings: Settings, rows: Iterable[Messages], max_new_tokens: int, seed: int, **options: Any) -> Client:
    """The local model for those rows: here, or in all processes of a launch where this is the first one.

    Raises:
        UserError: as `SLMClient`.
    """

    set_seed(seed)
    engine, _ = choose_engine(options.get("engine", "auto"), options.get("precision"))
    tokenizer = workload = None
    if engine == "vllm":
        tokenizer = load_tokenizer(model_path(settings, options.get("model")), options.get("trust_remote_code", False))
        workload = measure_workload(tokenizer, rows, max_new_tokens)
    if settings.launch.world == 1:
        return SLMClient(settings, max_new_tokens=max_new_tokens, workload=workload, tokenizer=tokenizer, **options)
    from slm_swap.clients.replicas import open_replicas

    price = load_prices(settings.prices_file).local
    return open_replicas(settings.launch, workload, lambda seconds: to_float(price.cost(seconds)))


def serve_rows(settings: Settings, seed: int, concurrency: int | None = None, **options: Any) -> None:
    """What the processes of a launch that `serves` do until the first one, with its `local_client`, is done.

    `options` are those of `factory.make_client`; `concurrency` has no meaning here.
    """
    from slm_swap.clients.replicas import serve

    @no_collections()
    def make(receive: Callable[[], Workload | None]) -> SLMClient:
        set_seed(seed)
        engine, _ = choose_engine(options.get("engine", "auto"), options.get("precision"))
        if engine == "vllm":  # while rank 0 looks at the rows
            from slm_swap.clients.engines.vllm_engine import import_vllm

            import_vllm()
        return SLMClient(settings, workload=receive(), **options)

    serve(settings.launch, make)


def with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """A loaded model with an adapter on it; `base` is where it was loaded from.

    Raises:
        UserError: the two do not fit.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the adapter {display_path(adapter)} does not fit the model {display_path(base)} ({_first_line(error)}): "
            "train it again on this model"
        ) from None


def files_hash(folder: Path) -> str:
    """A hash of the names and contents of what a checkpoint's or adapter's folder is loaded from: of blocks, by all cores at once."""
    kinds = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py"}
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name != "training_info.json")
    blocks = [(path, start) for path in files for start in range(0, max(1, path.stat().st_size), HASH_BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_block_hash, blocks)
        return text_hash("\n".join(f"{path.name} {start} {digest}" for (path, start), digest in zip(blocks, digests, strict=True)))


def _block_hash(block: tuple[Path, int]) -> str:
    path, start = block
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(HASH_BLOCK)).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
