"""A local checkpoint, its tokenizer and adapters: found, loaded and hashed."""

import hashlib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, Self

from slm_swap.clients.architecture import text_config
from slm_swap.clients.templates import require_text
from slm_swap.clients.thinking import use_thinking
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings, find_path, shown_path
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import Request

HASH_BLOCK = 16 << 20
SETTLED = 2 * 10**9  # nanoseconds: a file that was written since may be written again within one tick of the file system's clock
_HASHES: dict[tuple, str] = {}  # of folders by path and their files' names, sizes and times
GPU_DEVICE = Path("/dev/nvidia0")  # of the first GPU, where the driver has one
# What bitsandbytes leaves in 16 bits besides vectors: embeddings, the head, and experts, which transformers fuses into one tensor a layer.
FULL_WEIGHTS = re.compile(r"embed|lm_head|\.wte\.|\.experts\.|\.router\.")
DOWNLOAD = "hf download microsoft/Phi-4-mini-instruct --local-dir slm_swap/models/phi-4-mini"


def model_path(settings: Settings, given: str | Path | None = None, advice: str = "name another folder") -> Path:
    """The checkpoint's folder: `given`, else SLM_MODEL_PATH, from the checkout's root or from `slm_swap/`. `advice` is what to do where there is
    none at the given place.

    Raises:
        UserError: neither is set, or there is no checkpoint.
    """
    wanted = given or settings.slm_model_path
    if not wanted:
        raise UserError(f"SLM_MODEL_PATH is not set: get the model with `{DOWNLOAD}` and set SLM_MODEL_PATH=models/phi-4-mini")
    path = find_path(wanted)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            own = f"name its base instead ({advice})" if given else "pass it with --adapter, and its base as SLM_MODEL_PATH"
            raise UserError(f"{shown_path(path)} is an adapter, no model: {own}")
        if path.suffix == ".gguf" or any(path.glob("*.gguf")):
            raise UserError(f"{shown_path(path)} is in GGUF: serve it (llama.cpp, Ollama) and set SLM_BASE_URL, or get the model's safetensors checkpoint")
        raise UserError(f"no checkpoint at {shown_path(path)} (no config.json): {advice if given else f'get it with `{DOWNLOAD}` or set SLM_MODEL_PATH'}")
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
        raise UserError(f"no adapter at {shown_path(path)} (no adapter_config.json): make it with train_unsloth.py, or check --adapter")
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


def trained_as(model: Path) -> tuple[str | None, str | None, int | None]:
    """(ask, thinking, shots) of the prompts on which an adapter or merged model was trained; None for what its `training_info.json` does not say."""
    shots = _training_info(model, "inputs", "few_shot", "shots")
    return _training_info(model, "ask"), _training_info(model, "thinking"), 0 if shots is None and _training_info(model, "inputs") else shots


def trained_base(model: Path) -> str | None:
    """The `files_hash` of the weights that an adapter, or a merged model, was trained on; None where its `training_info.json` does not say."""
    return _training_info(model, "base_model", "files_sha256")


def require_base(adapter: Path, base: Path, files_sha256: str, advice: str) -> None:
    """Refuse an adapter over other weights than those that it was trained on, where it says which; `files_sha256` is the base's.

    Raises:
        UserError: so, with the advice.
    """
    if trained_base(adapter) not in (None, files_sha256):
        raise UserError(f"{shown_path(adapter)} was trained on other weights than {shown_path(base)}: {advice}")


def require_undamaged(folder: Path, files_sha256: str) -> None:
    """Refuse an adapter or merged model whose files are not those that were written, where its `training_info.json` says which.

    Raises:
        UserError: so.
    """
    if _training_info(folder, "files_sha256") not in (None, files_sha256):
        raise UserError(
            f"the files of {shown_path(folder)} do not match its training_info.json: they were damaged or changed; "
            "train or merge it again, or take `files_sha256` out of that file where the change is yours"
        )


def training_seconds(adapter: Path) -> float | None:
    """How long the making of an adapter took, by its `training_info.json`, in seconds; None where that does not say."""
    seconds = _training_info(adapter, "seconds", "total")
    return seconds if isinstance(seconds, (int, float)) and 0 <= seconds < math.inf else None


def quantization(precision: str) -> Any:
    """transformers' quantization config for a precision, None for unquantized weights."""
    import torch
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        quiet_packages()
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
        )
    return None


def quiet_packages() -> None:
    """bitsandbytes would tell at each product of 8-bit weights that it casts to float16: hundreds of lines a row. And, when it is imported
    on a CPU (PEFT does so), that it lacks a 4-bit kernel, which it does without. DeepSpeed would tell that there is no GPU."""
    for name in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_no_choice_of_the_cpu)  # it sets its own level


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed, without torch's compiler, of which the import would take longer than its own.

    What it would compile stands in for kernels that it lacks, and is launched step by step then. What this project compiles stays compiled.
    """
    given = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with suppress(Exception):  # of a broken installation, too: who needs it imports it again and says so
            import bitsandbytes  # noqa: F401
    finally:
        if given is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = given


def load_model(path: Path, precision: str, device_map: Any = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in one of transformers' precisions: the one loader of evaluation and training.

    Of a checkpoint that also sees or hears, the whole model; it is asked by text alone.

    Raises:
        UserError: the folder does not hold a whole model that transformers can load, or not in that precision.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quiet_packages()
    config = load_config(path, trust_remote_code)
    require_generation_config(path)
    require_precision(path, config, precision)
    known = [auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping]
    wanted = None if quantized_by(config) else quantization(precision)
    if wanted:
        import_bitsandbytes()
    options = {"quantization_config": wanted} if wanted else {}  # given as None, it would hide the checkpoint's own from transformers
    auto = known[0] if known else AutoModelForCausalLM  # code of the checkpoint's own is no part of either
    try:
        with without_load_report():
            model, told = auto.from_pretrained(
                path,
                dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
    except torch.OutOfMemoryError:
        raise UserError(
            f"{shown_path(path)} does not fit in memory in {precision}: use --precision nf4 or a larger GPU"
        ) from None
    except Exception as error:  # of whatever package the checkpoint needs
        raise _cannot_load(shown_path(path), error, config) from None
    require_whole(path, told)
    if not quantized_by(config):  # of those, packages write biases that are all 0
        require_plain_weights(path)
        require_used(path, model, told)
    return model


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """A checkpoint's transformers configuration.

    Raises:
        UserError: it cannot be read, or transformers does not know its type of model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the configuration may bring its own code
        raise _cannot_load(shown_path(path), error) from None


def quantized_by(config: Any) -> dict[str, Any]:
    """How a checkpoint's weights are quantized already; empty where they are not."""
    given = getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None) or {}
    return given if isinstance(given, dict) else given.to_dict()


def require_precision(path: Path, config: Any, precision: str) -> None:
    """Refuse to quantize weights again, to call those of bitsandbytes what they are not, and to read those of an unknown kind.

    Raises:
        UserError: so, with the precision that loads them as they are.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    given = quantized_by(config)
    if not given:
        return
    method = str(given.get("quant_method", "bitsandbytes"))
    bits = {"load_in_8bit": "int8", "load_in_4bit": "nf4"}
    own = next((name for key, name in bits.items() if given.get(key)), None)
    if (own and precision != own) or (not own and precision in ("int8", "nf4", "fp8") and precision != method):
        raise UserError(f"{shown_path(path)} is quantized already ({method}): use --precision {own or 'bf16'}, which loads its weights as they are")
    if not own and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # transformers would take them for plain ones
        raise UserError(f"{shown_path(path)} is quantized in a way that transformers does not know ({method}): pip install -U transformers, or use --engine vllm")


_LAYER = re.compile(r"\blayers\.(\d+)\b")


def require_generation_config(path: Path) -> None:
    """Refuse a generation_config.json that cannot be read: transformers goes on without it, and so without the ends that it names.

    Raises:
        UserError: so.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown_path(file)} ({first_line(error)}): download it again") from None
    if not isinstance(told, dict):
        raise UserError(f"{shown_path(file)} is no JSON object: download it again")


def require_whole(path: Path, told: dict[str, Any]) -> None:
    """Refuse a model of which weights were not in the checkpoint: transformers makes them up at random and goes on.

    `told` is what transformers says of loading it.

    Raises:
        UserError: so.
    """
    missing = sorted(told["missing_keys"])
    shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in sorted(told["mismatched_keys"])]
    for names, said in ((missing, "lacks"), (shapes, "has of other shapes than its config.json says")):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"{shown_path(path)} {said} {len(names)} weights ({shown}), which would be random: "
                "download it again, or use a checkpoint that has them"
            )


def require_used(path: Path, model: Any, told: dict[str, Any]) -> None:
    """Refuse a checkpoint with weights that the model would run without: of layers that it has, as a bias that its config.json denies, or
    of further layers of the decoder.

    Whole parts to spare (for images, for predicting several tokens) are nobody's loss. `told` is what transformers says of loading it.

    Raises:
        UserError: so.
    """
    layers = {name for name, _ in model.named_modules()}
    config = text_config(model.config)
    # those of multi-token prediction stand behind the decoder's and have their names
    count = getattr(config, "num_hidden_layers", 0) + (getattr(config, "num_nextn_predict_layers", None) or 0)

    def has_layer(name: str) -> bool:
        place = _LAYER.search(name)
        return name in layers or (place is not None and int(place[1]) >= count and f"{name[: place.start(1)]}0{name[place.end(1) :]}" in layers)

    spare = sorted(name for name in told["unexpected_keys"] if name.endswith((".weight", ".bias")) and has_layer(name.rpartition(".")[0]))
    if spare:
        shown = ", ".join(spare[:3]) + (", ..." if len(spare) > 3 else "")
        raise UserError(f"{shown_path(path)} has {len(spare)} weights that its config.json leaves out ({shown}): download it again, or use another checkpoint")


def require_plain_weights(path: Path) -> None:
    """Refuse whole numbers and 8-bit floats as weights where config.json does not say how they were quantized: their scales would be lost.

    Raises:
        UserError: so.
    """
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                if name.endswith(".weight") and (dtype := tensors.get_slice(name).get_dtype()).startswith(("I", "U", "F8")):
                    raise UserError(
                        f"{shown_path(file)} has weights in {dtype} ({name}), and config.json does not say how they were quantized: download it again"
                    )


def require_numbers(path: Path, model: Any) -> None:
    """Refuse a model whose logits are no numbers: the best of them is then token 0, and each reply the same nonsense.

    Raises:
        UserError: so.
    """
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)).logits
    if not logits.isfinite().all():
        raise UserError(
            f"{shown_path(path)} gives no numbers (NaN or infinity): its weights are damaged, or too large for this --precision: use another, or download it again"
        )


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of weights that a checkpoint lacks or has to spare: `require_whole` says what counts, in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_no_load_report)


def _no_choice_of_the_cpu(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def load_tokenizer(path: Path, trust_remote_code: bool = False, thinking: str | None = None) -> Any:
    """The checkpoint's tokenizer, padding on the left, with a chat template that asks for thinking or not: see `use_thinking`.

    Raises:
        UserError: there is none, it has no chat template, or one that cannot ask so.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, padding_side="left")
    except Exception as error:  # of the tokenizers package: a bare Exception
        raise _cannot_load(f"the tokenizer of {shown_path(path)}", error) from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {shown_path(path)} has no chat template: use an instruct checkpoint")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    require_text(tokenizer)
    use_thinking(tokenizer, thinking)
    require_vocabulary(tokenizer, path, trust_remote_code)
    return tokenizer


def require_vocabulary(tokenizer: Any, path: Path, trust_remote_code: bool) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes where its files are not there, and one whose chat template writes
    tokens that the model has no embeddings for. What it has besides, a token for images or for padding, is looked for in each prompt.

    Raises:
        UserError: so.
    """
    from slm_swap.clients.native import CannotShow
    from slm_swap.rows.prompts import Request

    said = tokenizer("probe", add_special_tokens=False)["input_ids"]
    if "probe" not in tokenizer.decode(said):
        raise UserError(
            f"the tokenizer of {shown_path(path)} knows no words: its vocabulary (tokenizer.json, tokenizer.model or vocab.json) is missing or empty: "
            "download the checkpoint again"
        )
    tokenizer.slm_swap_embeddings = getattr(text_config(load_config(path, trust_remote_code)), "vocab_size", None)
    try:
        encode_prompts(tokenizer, [Request([{"role": "user", "content": "probe"}])])
    except CannotShow as error:
        reason = str(error).partition(": ")[0]
        raise UserError(f"the tokenizer of {shown_path(path)} is another model's ({reason}): download the checkpoint again, or use another") from None


def require_embedded(tokenizer: Any, tokens: list[int]) -> None:
    """Look whether the model has an embedding for each of a row's tokens: on a GPU another one ends the whole process.

    Raises:
        CannotShow: it has not.
    """
    from slm_swap.clients.native import CannotShow

    known = getattr(tokenizer, "slm_swap_embeddings", None)
    if known is not None and max(tokens, default=0) >= known:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise CannotShow(f"the model has no embedding for the token {token!r}, number {max(tokens)} of {known}: leave the row out, or take another checkpoint")


def padding_id(tokenizer: Any) -> int:
    """The token for places that are masked: the tokenizer's own, or any where it has none or the model no embedding for it."""
    known = getattr(tokenizer, "slm_swap_embeddings", None)
    own = tokenizer.pad_token_id
    return 0 if own is None or (known is not None and own >= known) else own


def _cannot_load(what: str, error: Exception, config: Any = None) -> UserError:
    """What a package raised while loading, in one line with what to do about it."""
    text, shown = str(error), first_line(error)
    if "trust_remote_code" in text:
        return UserError(f"{what} brings code of its own: read it, then pass --trust-remote-code to run it")
    if isinstance(error, ImportError) and "cannot import name" in text:
        advice = "its own code is for another version of transformers: use --engine vllm, or a checkpoint that needs no code"
    elif isinstance(error, ImportError):
        advice = "install the package that it names with pip, or use --engine vllm"
    elif "Weights only load failed" in text:
        shown, advice = "its .bin file holds more than weights, and would run as code", "use a checkpoint in safetensors"
    elif "does not recognize this architecture" in text or "Unrecognized model" in text:
        import transformers

        shown = text.split(" but Transformers")[0].split("The checkpoint you are trying to load ")[-1].split(". Should")[0]
        advice = f"transformers {transformers.__version__} does not know it: pip install -U transformers, or use another checkpoint"
    elif "Unrecognized configuration class" in text:
        shown, advice = f"a {config.model_type} model writes no text", "use an instruct checkpoint"
    elif config is not None and (method := quantized_by(config).get("quant_method")):
        advice = f"its weights are quantized ({method}): use --engine vllm, or a checkpoint that is not quantized"
    else:
        advice = "check the checkpoint or download it again"
    return UserError(f"cannot load {what} ({shown}): {advice}")


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
    """`encode_prompt` of several rows, by all cores at once.

    Raises:
        CannotShow: a row cannot be shown, by the chat template or for want of an embedding.
        UserError: as `prompt_text`.
    """
    texts = [prompt_text(tokenizer, request) for request in rows]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for tokens in encoded:
        require_embedded(tokenizer, tokens)
    return encoded


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a reply of this text has, without the one that ends it."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def placement(path: Path, precision: str, processes: int = 1) -> Any:
    """transformers' device_map: the first GPU where the model fits on it, so that no layer waits for another GPU's; else "auto".

    Raises:
        UserError: it does not fit, and the other GPUs are other processes'; or a GPU has not even memory left to be started.
    """
    import torch

    if not torch.cuda.is_available():
        if GPU_DEVICE.exists() and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            print("warning: torch cannot use this machine's NVIDIA GPU (see nvidia-smi): the model runs on the CPU", file=sys.stderr, flush=True)
        return "auto"
    weights = weight_bytes(path, precision)
    try:
        free = torch.cuda.mem_get_info(0)[0]
    except torch.AcceleratorError as error:
        raise UserError(f"the GPU cannot be used ({first_line(error)}): see nvidia-smi for what else runs on it") from None
    if 1.2 * weights < free:
        return {"": 0}
    if processes > 1:
        raise UserError(
            f"{shown_path(path)} needs {1.2 * weights / 2**30:.1f} GiB in {precision} and a GPU has {free / 2**30:.1f} GiB free: "
            "start one process by python, which spreads it over all GPUs, or use --precision nf4"
        )
    return "auto"


def weight_bytes(path: Path, precision: str) -> float:
    """How much memory a checkpoint's weights take in a precision, in bytes; quantized are the matrices of linear layers alone.

    Raises:
        UserError: a file of weights cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    full, linear = {"int8": (2, 1), "nf4": (2, 0.6), "fp32": (4, 4)}.get(precision, (2, 2))
    total = 0.0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no mapping
                    told = tensors.get_slice(name)
                    shape, dtype = told.get_shape(), told.get_dtype()
                    packed = dtype[0] in "IU" or dtype.startswith("F8")  # quantized already
                    fits = len(shape) == 2 and not FULL_WEIGHTS.search(name)
                    total += math.prod(shape) * (int(re.sub(r"^\D+|_.*", "", dtype)) / 8 if packed else linear if fits else full)
        except SafetensorError as error:
            raise UserError(f"cannot load {shown_path(file)} ({first_line(error)}): download it again") from None
    # pickled ones do not say what is in them without being loaded: most of them are matrices of linear layers in 16 bits
    return total or linear / 2 * sum(file.stat().st_size for file in path.glob("pytorch_model*.bin"))


def with_adapter(model: Any, adapter: Path, base: Path) -> Any:
    """A loaded model with an adapter on it; `base` is where it was loaded from.

    Raises:
        UserError: the two do not fit.
    """
    import torch

    import_bitsandbytes()  # PEFT would
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # layers of the model for which the adapter has no weights would stay as they are
            warnings.filterwarnings("error", message=".*missing adapter keys")
            tuned = PeftModel.from_pretrained(model, str(adapter))
        require_taken(tuned, adapter)
        put_rows_in_place(tuned)
        return tuned
    except torch.OutOfMemoryError:
        raise UserError(f"the adapter {shown_path(adapter)} does not fit in memory: use --precision nf4 or a larger GPU") from None
    except ImportError as error:
        raise UserError(f"the adapter {shown_path(adapter)} needs a package ({first_line(error)}): install it with pip") from None
    except Exception as error:  # of PEFT or what the adapter needs
        raise UserError(
            f"the adapter {shown_path(adapter)} does not fit the model {shown_path(base)} ({first_line(error)}): "
            "train it again on this model"
        ) from None


def require_taken(tuned: Any, adapter: Path) -> None:
    """Refuse LoRA weights of layers that the model has and adapter_config.json leaves out: PEFT would go on without them.

    Raises:
        ValueError: so.
    """
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        return
    layers = dict(tuned.get_base_model().named_modules())
    with safe_open(file, "pt") as tensors:
        names = [name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in tensors.keys() if ".lora_A" in name]  # noqa: SIM118
    left = sorted(name for name in names if name in layers and not hasattr(layers[name], "lora_A"))
    if left:
        raise ValueError(f"its target_modules leave out {len(left)} layers that it has weights for, as {left[0]}")


def put_rows_in_place(tuned: Any) -> None:
    """Write the rows of embedding and head that an adapter has trained into those matrices.

    PEFT would copy both matrices as a whole for each token: 1.2 GB twice for Phi-4-mini's vocabulary.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in tuned.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge()


class BackgroundHashes:
    """`files_hash` of each folder, made while packages are imported and the model is loaded, which finds its files in memory then.

    A context: an error inside ends the hashing, and waits for no more than the blocks that are being read.
    """

    def __init__(self, folders: Sequence[Path]):
        self._stop = Event()
        thread = ThreadPoolExecutor(1)
        self._told = thread.submit(lambda: [files_hash(folder, self._stop) for folder in folders])
        thread.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()

    def result(self) -> list[str]:
        """The hashes, in the folders' order, once they are made.

        Raises:
            OSError: a file cannot be read.
            CancelledError: an error has ended the hashing.
        """
        return self._told.result()


def files_hash(folder: Path, stop: Event | None = None) -> str:
    """A hash of the names and contents of what a checkpoint's or adapter's folder is loaded from: of blocks, by all cores at once.

    Once for a process, as long as no file has another size or time: some models have many GB.

    Raises:
        OSError: a file cannot be read.
        CancelledError: `stop` was set meanwhile.
    """
    kinds = {".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py"}
    files = sorted(path for path in folder.iterdir() if path.suffix in kinds and path.name != "training_info.json")
    begun, found = time.time_ns(), [(path, path.stat()) for path in files]
    known = folder.resolve(), *((path.name, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns) for path, told in found)
    if known in _HASHES:
        return _HASHES[known]
    blocks = [(path, start) for path, told in found for start in range(0, max(1, told.st_size), HASH_BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda block: _block_hash(block, stop), blocks)
        made = text_hash("\n".join(f"{path.name} {start} {digest}" for (path, start), digest in zip(blocks, digests, strict=True)))
    if all(told.st_ctime_ns < begun - SETTLED for _, told in found):
        _HASHES[known] = made
    return made


def _block_hash(block: tuple[Path, int], stop: Event | None) -> str:
    if stop is not None and stop.is_set():
        raise CancelledError
    path, start = block
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(HASH_BLOCK)).hexdigest()


def first_line(error: BaseException) -> str:
    """What stands first in an error's message, cut to 200 characters; of one without a message, its class."""
    return (str(error) or type(error).__name__).strip().split("\n")[0][:200]
