"""What trains: Unsloth or TRL with PEFT, DeepSpeed or not, and the base model with fresh LoRA weights."""

import atexit
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from slm_swap.clients.architecture import text_config
from slm_swap.clients.loading import load_model, quiet_packages, require_numbers
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Launch, display_path, find_path
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.untrained import start_rows, token_indices


def choose_backend(wanted: str, packing: bool = False, precision: str = "int8") -> str:
    """`auto` is Unsloth where there is a CUDA GPU, and TRL + PEFT elsewhere, and where rows or steps are packed: there it is
    faster. Unsloth knows no fp8.

    Raises:
        UserError: Unsloth is asked for and cannot work here.
    """
    import importlib.util

    import torch

    installed = importlib.util.find_spec("unsloth") is not None
    if wanted == "auto":
        return "unsloth" if torch.cuda.is_available() and installed and not packing and precision != "fp8" else "trl"
    if wanted == "unsloth" and precision == "fp8":
        raise UserError("--backend unsloth does not train in fp8: use --backend trl, or --precision bf16")
    if wanted == "unsloth" and not torch.cuda.is_available():
        raise UserError("--backend unsloth needs a CUDA GPU and there is none: use --backend trl")
    if wanted == "unsloth" and not installed:
        raise UserError("unsloth is not installed: pip install -r requirements.txt, or use --backend trl")
    return wanted


def has_gpu(launch: Launch) -> bool:
    """Whether this process has a GPU of its own, or none has one."""
    import torch

    return not torch.cuda.is_available() or launch.local_rank < torch.cuda.device_count()


def choose_deepspeed(given: str | None, launch: Launch) -> Path | None:
    """DeepSpeed's configuration, `given`; for None and "none" no DeepSpeed: plain DDP is faster, as LoRA has little that ZeRO could share out.

    Raises:
        UserError: there is no such file, or DeepSpeed cannot work here.
    """
    import importlib.util

    import torch

    if given in (None, "none"):
        return None
    path = find_path(given)
    if not path.is_file():
        raise UserError(f"no DeepSpeed configuration at {display_path(path)}: check --deepspeed-config, or leave it out")
    if launch.world == 1 or not torch.cuda.is_available():
        raise UserError(
            "DeepSpeed is for several processes on CUDA GPUs: start them with torchrun or accelerate launch, or leave --deepspeed-config out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install -r requirements.txt, or leave --deepspeed-config out")
    return path


def load_trainable(
    path: Path,
    parameters: Hyperparameters,
    backend: str,
    device: Any,
    find_untrained: Callable[[Any], dict[int, int | None]] = lambda _: {},
    rows: Sequence[dict[str, list[int]]] = (),
) -> Any:
    """The base model on `device` (a torch.device), frozen, with fresh LoRA weights on all linear layers.

    The rows of the tokens that `find_untrained` finds in the base model are trained, too. `rows` are those to train on, {"input_ids"}: in fp8 they
    show which columns of an input need more bits.

    Raises:
        UserError: the model cannot be loaded, or the back end cannot train those tokens.
    """
    if backend == "unsloth":
        return _load_unsloth(path, parameters, find_untrained)
    from peft import LoraConfig, get_peft_model

    model = load_model(path, parameters.precision, device_map={"": device})
    if parameters.precision == "int8":
        from slm_swap.clients.int8 import give_own_products

        give_own_products(model)
    elif parameters.precision == "fp8":
        from slm_swap.tuning.fp8 import give_fp8_products

        give_fp8_products(model, decoder_of(model), fit_layers(model), rows)
    require_numbers(path, model)
    if getattr(text_config(model.config), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers' `sdpa` leaves soft-capping out without a word
    tokens = find_untrained(model)
    lora = LoraConfig(
        r=parameters.lora_r,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=linear_names(model),
        task_type="CAUSAL_LM",
        trainable_token_indices=token_indices(model, tokens),
    )
    tuned = get_peft_model(model, lora)
    if tokens:
        start_rows(tuned, tokens)
    leave_types_to_autocast(tuned)
    return tuned


def leave_types_to_autocast(model: Any) -> None:
    """Have a PEFT model's LoRA drop out of its input in the type that it has, where autocast chooses the type of products.

    PEFT turns an input to the 32 bits of LoRA's weights, and autocast turns what dropout leaves of it back to 16: the same values, by more than twice the
    memory's traffic.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._cast_input_dtype = _as_autocast_takes_it


def _as_autocast_takes_it(x: Any, dtype: Any) -> Any:
    import torch

    return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def products_of(backend: str, precision: str) -> str:
    """In what the products with the frozen weights are made, as `training_info.json` says it."""
    if precision == "int8":
        return "bf16" if backend == "trl" else "LLM.int8()"
    return {"nf4": "bf16"}.get(precision, precision)


def import_unsloth(generated: Path, rank: int) -> None:
    """Import Unsloth, which patches transformers and TRL and so must come before them.

    The code that it generates goes into the folder `generated`, which rank 0 removes in the end, not into whatever folder one is in,
    where two trainings would share it.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(generated.resolve()))
    if rank == 0:
        atexit.register(shutil.rmtree, generated, ignore_errors=True)
    import unsloth  # noqa: F401


def _load_unsloth(path: Path, parameters: Hyperparameters, find_untrained: Callable[[Any], dict[int, int | None]]) -> Any:
    import torch
    from transformers import AutoConfig

    # Unsloth compiles by default. bitsandbytes' 8-bit layers break its graphs: more than a minute, on an H200, before the first step.
    if parameters.compile == "no" or (parameters.compile == "auto" and parameters.precision == "int8"):
        os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    from unsloth import FastLanguageModel

    quiet_packages()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=parameters.pack_length if parameters.packing else parameters.max_length,
        dtype=torch.float32 if parameters.precision == "fp32" else torch.bfloat16,
        load_in_4bit=parameters.precision == "nf4",
        load_in_8bit=parameters.precision == "int8",
    )
    vocabulary = text_config(AutoConfig.from_pretrained(path)).vocab_size
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        # Where padding and the end of a text are one token, Unsloth adds a row for another: the checkpoint has none.
        model.resize_token_embeddings(vocabulary)
    if find_untrained(model):
        raise UserError(f"{display_path(path)} never learned to end a reply, and Unsloth does not train its end token: use --backend trl")
    if isinstance(names := linear_names(model), str):
        raise UserError("--backend unsloth cannot keep LoRA to the text decoder of this model, which has more parts: use --backend trl")
    return FastLanguageModel.get_peft_model(
        model,
        r=parameters.lora_r,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=names,
        use_gradient_checkpointing="unsloth" if parameters.gradient_checkpointing else False,
        random_state=parameters.seed,
    )


def fit_layers(model: Any) -> list[str]:
    """The names of a text decoder's linear layers that LoRA fits, the output head left out."""
    from torch import nn

    inside = {id(module) for module in decoder_of(model).modules()} - {id(model.get_output_embeddings())}
    unfit = set(unfit_layers(model))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside and name not in unfit]


def linear_names(model: Any) -> list[str] | str:
    """What LoRA goes onto: `fit_layers`, as PEFT's `target_modules`.

    Names where they name no other layer, else a regular expression of whole names: a vision tower may have layers of the same names.

    Raises:
        UserError: there are none, or no text decoder.
    """
    from torch import nn

    wanted = set(fit_layers(model))
    if not wanted:
        raise UserError(f"{type(model).__name__} has no linear layers for LoRA to go onto: use another model")
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} | set(unfit_layers(model))
    names = {name.rsplit(".", 1)[-1] for name in wanted}
    if names.isdisjoint(name.rsplit(".", 1)[-1] for name in others - wanted):
        return sorted(names)
    return "|".join(sorted({re.sub(r"\b\d+\b", r"\\d+", re.escape(name)) for name in wanted}))


def decoder_of(model: Any) -> Any:
    """The text decoder of a causal language model, which ends where the output head begins.

    Raises:
        UserError: none can be found.
    """
    found = model.get_decoder()
    if found is model:  # Llama 4's is called otherwise than its class says
        found = getattr(model, "model", model)
    if found is model:
        raise UserError(f"cannot find the text decoder in {type(model).__name__}: use another model")
    return found


@contextmanager
def attending_by(model: Any, implementation: str) -> Iterator[None]:
    """Within it a causal language model's text decoder attends by another of transformers' implementations."""
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(implementation)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def unfit_layers(model: Any) -> list[str]:
    """The names of linear layers that LoRA, which changes what a layer gives when it is called, does not fit.

    A model's code may use the weights itself, as Mamba's kernels do: LoRA would do nothing. Or a layer gives more than a product, as Llama
    4's routers do: LoRA would break it. Or PEFT takes its name, of a shared expert, for that of all other experts' tensors.
    """
    from torch import nn

    found, of_experts = [], _names_of_experts(model)
    for name, parent in model.named_modules():
        for child, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and (child in of_experts or _uses_weight(type(parent), child) or not _gives_product(layer)):
                found.append(f"{name}.{child}" if name else child)
    return found


def _names_of_experts(model: Any) -> set[str]:
    """The names that PEFT turns into those of stacked experts, as adapters of transformers 4 have them."""
    from peft.utils import transformers_weight_conversion as peft_names

    return set(peft_names._MOE_TARGET_MODULE_MAPPING.get(peft_names._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type), ()))


def _gives_product(layer: Any) -> bool:
    """Whether a linear layer of transformers' own making gives one tensor of `out_features`, as nn.Linear does."""
    import torch

    if not type(layer).__module__.startswith("transformers"):
        return True
    with torch.no_grad():
        given = layer(torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    return torch.is_tensor(given) and given.shape == (1, layer.out_features)


@cache
def _uses_weight(parent: type, child: str) -> bool:
    """Whether a module's code reads a layer's weight for more than its device, type or shape."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):  # made while the program runs
        return False
    return re.search(rf"self\.{child}\.weight\b(?!\.(device|dtype|shape))", source) is not None
