"""The local small model, on transformers."""

import json
import math
import time
from collections.abc import Generator, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from slm_swap.clients import Reply, stream_batches
from slm_swap.errors import UserError
from slm_swap.examples import text_hash
from slm_swap.pricing import load_prices, to_float
from slm_swap.prompts import Messages
from slm_swap.reports import sha256_file
from slm_swap.settings import Settings, display_path, find_path

PRECISIONS = ("int8", "bf16", "fp32", "nf4")
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
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
        )
    return None


def load_model(path: Path, precision: str, device_map: Any = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model of one of PRECISIONS: the one loader of evaluation and training.

    Raises:
        UserError: the folder does not hold a model that transformers can load.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
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
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class SLMClient:
    """The local model: greedy decoding in left-padded batches, only the new tokens decoded.

    The same rows give the same replies whatever the batch size, up to numeric ties. A batch that does not fit in memory is
    halved and tried again. A prompt that leaves no room in the context gives a `length` reply instead of being cut.

    Args:
        precision: "int8" (LLM.int8(), the documented setting), "nf4", "bf16" or "fp32".
        adapter: folder of a PEFT adapter.

    Raises:
        UserError: no checkpoint or adapter, one that does not fit the other, or prices that cannot be read.
    """

    kind = "slm"

    def __init__(
        self,
        settings: Settings,
        model: str | Path | None = None,
        precision: str = "int8",
        adapter: str | Path | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ):
        self.precision, self.max_new_tokens, self.batch_size = precision, max_new_tokens, batch_size
        self.prices = load_prices(settings.prices_file)
        self.path, self.adapter = model_path(settings, model), adapter_path(adapter)
        self.training_seconds = training_seconds(self.adapter) if self.adapter else None
        started = time.perf_counter()
        self.tokenizer = load_tokenizer(self.path, trust_remote_code)
        self.model = load_model(self.path, precision, trust_remote_code=trust_remote_code)
        if self.adapter:
            self.model = _with_adapter(self.model, self.adapter, self.path)
        self.model.eval()
        self.context = self.model.config.max_position_embeddings
        self.halved = 0
        self.load_seconds = time.perf_counter() - started

    def generate(self, batch: list[Messages]) -> list[Reply]:
        """Replies in the rows' order; `batch_size` rows at a time."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in batch]
        replies: dict[int, Reply] = {}
        whole, tight = [], []
        for index, prompt in enumerate(prompts):
            room = self.context - len(prompt)
            if room < 1:
                error = f"the prompt has {len(prompt)} tokens, the context {self.context}"
                replies[index] = Reply("", "length", input_tokens=len(prompt), error=error)
            else:
                # A row with less room than the others goes alone, so that it does not shorten their replies.
                (whole if room >= self.max_new_tokens else tight).append(index)
        groups = [whole[at : at + self.batch_size] for at in range(0, len(whole), self.batch_size)] + [[index] for index in tight]
        for group in groups:
            replies.update(zip(group, self._generate_group([prompts[index] for index in group]), strict=True))
        return [replies[index] for index in range(len(batch))]

    def _generate_group(self, prompts: list[list[int]]) -> list[Reply]:
        import torch

        try:
            return self._generate_once(prompts)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                raise
        if len(prompts) == 1:
            raise UserError(
                f"a prompt of {len(prompts[0])} tokens alone does not fit in memory: use --precision nf4 or a larger GPU"
            )
        self.halved += 1
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._generate_group(prompts[:half]) + self._generate_group(prompts[half:])

    def _generate_once(self, prompts: list[list[int]]) -> list[Reply]:
        import torch

        started = time.perf_counter()
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        width = padded["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(
                **padded,
                max_new_tokens=min(self.max_new_tokens, self.context - width),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        seconds = time.perf_counter() - started
        return [self._reply(prompt, new.tolist(), ends, seconds) for prompt, new in zip(prompts, output[:, width:], strict=True)]

    def _reply(self, prompt: list[int], new: list[int], ends: set[int], seconds: float) -> Reply:
        stop = next((index for index, token in enumerate(new) if token in ends), None)
        kept = new if stop is None else new[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        spent = len(kept) + (stop is not None)  # the end token was generated too
        return Reply(text, "length" if stop is None else "stop", len(prompt), spent, 0, seconds)

    def stream(self, rows: Iterable[tuple[int, Messages]]) -> Generator[tuple[int, Reply]]:
        return stream_batches(self.generate, rows, self.batch_size)

    @cached_property
    def _told(self) -> dict[str, Any]:
        config = self.model.config.to_dict()
        parameters = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "do_sample": False}
        return {
            "kind": self.kind,
            "path": display_path(self.path),
            "config_sha256": text_hash(json.dumps(config, sort_keys=True, default=str)),
            "precision": self.precision,
            "engine": "transformers",
            "adapter": display_path(self.adapter) if self.adapter else None,
            "training_seconds": self.training_seconds,
            "device": str(self.model.device),
            "parameters": parameters,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        folders = [self.path, *([self.adapter] if self.adapter else [])]
        return self._told | {"files_sha256": [_files_hash(folder) for folder in folders]}

    def state(self) -> dict[str, Any]:
        return {"batches_halved": self.halved}

    def restore(self, state: dict[str, Any]) -> None:
        self.halved = state["batches_halved"]

    def describe(self) -> dict[str, Any]:
        return self._told | self.state()

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """The machine's price an hour times the seconds that it worked."""
        return to_float(self.prices.local.cost(seconds))

    def close(self) -> None: ...


def _with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the adapter {display_path(adapter)} does not fit the model {display_path(base)} ({_first_line(error)}): "
            "train it again on this model"
        ) from None


def _files_hash(folder: Path) -> str:
    """sha256 over the names and contents of what a checkpoint's or adapter's folder is loaded from."""
    kinds = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py"}
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name != "training_info.json")
    return text_hash("\n".join(f"{path.name} {sha256_file(path)}" for path in files))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
