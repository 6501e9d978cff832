"""A local checkpoint, its tokenizer and adapters: found, loaded and hashed."""

import hashlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slm_swap.clients.templates import require_text
from slm_swap.clients.thinking import use_thinking
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings, display_path, find_path
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import Request

HASH_BLOCK = 16 << 20
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


def _training_info(adapter: Path, *place: str) -> Any:
    """What `training_info.json` says at a place; None where it does not say."""
    try:
        told = json.loads((adapter / "training_info.json").read_text(encoding="utf-8"))
        for name in place:
            told = told[name]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return told


def trained_as(model: Path) -> tuple[str | None, str | None]:
    """(ask, thinking) of the prompts on which an adapter or merged model was trained; None for what its `training_info.json` does not say."""
    return _training_info(model, "ask"), _training_info(model, "thinking")


def require_base(adapter: Path, base: Path, files_sha256: str, advice: str) -> None:
    """Refuse an adapter over other weights than those that it was trained on, where it says which; `files_sha256` is the base's.

    Raises:
        UserError: so, with the advice.
    """
    if _training_info(adapter, "base_model", "files_sha256") not in (None, files_sha256):
        raise UserError(f"{display_path(adapter)} was trained on other weights than {display_path(base)}: {advice}")


def training_seconds(adapter: Path) -> float | None:
    """How long the making of an adapter took, by its `training_info.json`, in seconds; None where that does not say."""
    seconds = _training_info(adapter, "seconds", "total")
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


def load_tokenizer(path: Path, trust_remote_code: bool = False, thinking: str | None = None) -> Any:
    """The checkpoint's tokenizer, padding on the left, with a chat template that asks for thinking or not: see `use_thinking`.

    Raises:
        UserError: there is none, it has no chat template, or one that cannot ask so.
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
    require_text(tokenizer)
    use_thinking(tokenizer, thinking)
    return tokenizer


def prompt_text(tokenizer: Any, request: Request) -> str:
    """What a model is shown for one row, as text: the same in evaluation and in training.

    Raises:
        UserError: the chat template cannot show the request: see `native.native_prompt`.
    """
    from slm_swap.clients.native import native_prompt, text_prompt

    return native_prompt(tokenizer, request) if request.native else text_prompt(tokenizer, request)


def encode_prompt(tokenizer: Any, request: Request) -> list[int]:
    """The token ids of `prompt_text`."""
    return encode_prompts(tokenizer, [request])[0]


def encode_prompts(tokenizer: Any, rows: list[Request]) -> list[list[int]]:
    """`encode_prompt` of several rows, by all cores at once."""
    texts = [prompt_text(tokenizer, request) for request in rows]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a reply of this text has, without the one that ends it."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


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
        return text_hash(
            "\n".join(f"{path.name} {start} {digest}" for (path, start), digest in zip(blocks, digests, strict=True))
        )


def _block_hash(block: tuple[Path, int]) -> str:
    path, start = block
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(HASH_BLOCK)).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
