"""An adapter merged into its base model: a checkpoint of its own, for engines that take no adapters."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from slm_swap.clients.endings import reply_ends
from slm_swap.clients.loading import (
    files_hash,
    first_line,
    load_config,
    load_model,
    load_tokenizer,
    require_base,
    require_undamaged,
    with_adapter,
)
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import wrapped, writing
from slm_swap.common.reports import code_version, now, read_json, sha256_file, write_json
from slm_swap.common.settings import display_path
from slm_swap.common.temporary import beside, remove_leftovers
from slm_swap.tuning.record import INFO

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DTYPES = ("bf16", "fp32")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What a family reads besides weights and configuration, which transformers does not write: processors and other tokenizers' files.
BESIDE = ("*processor_config.json", "chat_template*", "tokenizer*", "*.model", "tekken.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Write `base` with the weights of `adapter` added to its own into the folder `out`: all of it or nothing.

    It has the base's class, images' part included, and the files that its processors read. Gives its `training_info.json`: that of the
    adapter, whose training seconds are the checkpoint's too, and what was merged.

    Raises:
        UserError: `out` is there already or cannot be written; the adapter is not one of this base, or the two cannot be merged.
    """
    if out.exists():
        raise UserError(f"{display_path(out)} exists already: choose another --out, or delete it")
    weights = next((adapter / name for name in WEIGHTS if (adapter / name).exists()), None)
    if weights is None:
        raise UserError(f"no weights in {display_path(adapter)} ({' or '.join(WEIGHTS)}): train the adapter again")
    info = read_json(adapter / INFO, "train_unsloth.py") if (adapter / INFO).exists() else {}
    found = files_hash(base)
    require_base(adapter, base, found, "pass its base with --model")
    require_undamaged(adapter, files_hash(adapter))
    with ExitStack() as stack:
        with writing(out):  # first: a place that cannot be written is told of at once
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            staged = stack.enter_context(beside(out, folder=True))
        tokenizer = load_tokenizer(base)
        model = whole_model(merged(load_model(base, dtype, device_map={"": "cpu"}), adapter, base), base)
        generation = model.generation_config
        # other servers go by this file alone
        generation.eos_token_id = sorted(reply_ends(tokenizer, generation.eos_token_id, getattr(model.config, "eos_token_id", None)))
        left_out = make_valid(generation)
        with writing(out):
            save(model, tokenizer, base, staged)
        info["merged"] = {
            "created_at": now(),
            "adapter": {"path": display_path(adapter), "sha256": sha256_file(weights)},
            "base_model": {"path": display_path(base), "files_sha256": found},
            "dtype": dtype,
            "generation_config_left_out": left_out,
            "code": code_version(),
        }
        info["files_sha256"] = files_hash(staged)
        with writing(out):
            write_json(staged / INFO, info)
            staged.rename(out)
    return info


def make_valid(config: Any) -> dict[str, Any]:
    """Take out of a generation configuration what transformers refuses to write; gives that.

    Older checkpoints name a temperature or top_p without `do_sample`. transformers decodes such a model greedily and does not use these
    values, so they go: `do_sample: true` would keep them, and make a merged model sample where its base, as evaluation does, does not.
    Whatever else is invalid takes all but the special tokens with it.
    """
    left_out = {}
    others = [name for name in config.to_diff_dict() if not name.endswith(("_token_id", "_version"))]
    for names in (SAMPLING if config.do_sample is not True else (), others):
        if is_valid(config):
            break
        for name in names:
            if (value := getattr(config, name, None)) != (neutral := getattr(type(config)(), name, None)):
                left_out[name] = value
                setattr(config, name, neutral)
    return left_out


def is_valid(config: Any) -> bool:
    """Whether transformers would write this generation configuration."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def merged(model: Any, adapter: Path, base: Path) -> Any:
    """The model with the adapter's weights, and its trained rows of embedding and head, added to its own.

    Raises:
        UserError: the adapter does not fit the model, or PEFT cannot merge the two.
    """
    tuned = with_adapter(model, adapter, base)
    try:
        return tuned.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"cannot merge {display_path(adapter)} into {display_path(base)} ({first_line(error)}): serve base and adapter as they are, or train it again"
        ) from None


def whole_model(model: Any, base: Path) -> Any:
    """The model in its checkpoint's own class: where the text part of a larger one was loaded alone, the larger one with these weights.

    Raises:
        UserError: the larger one cannot be loaded, or the part is none of it.
    """
    from transformers import AutoModelForImageTextToText

    if type(model.config) is type(load_config(base)):
        return model
    try:
        whole = AutoModelForImageTextToText.from_pretrained(base, dtype=model.dtype, device_map={"": "cpu"})
        for mine, theirs in ((model.get_decoder(), whole.get_decoder()), (model.get_output_embeddings(), whole.get_output_embeddings())):
            theirs.load_state_dict(mine.state_dict())
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot merge into the whole of {display_path(base)} ({first_line(error)}): serve base and adapter as they are") from None
    return whole


def save(model: Any, tokenizer: Any, base: Path, folder: Path) -> None:
    """Write model and tokenizer into a folder, and beside them what else the base's family reads.

    Raises:
        OSError: the folder cannot be written; a package's own exception may stand for it (`os_errors.wrapped`).
        UserError: transformers or safetensors does not write this model.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (SafetensorError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if wrapped(error):
            raise
        raise UserError(f"cannot write the merged model of {display_path(base)} ({first_line(error)}): serve base and adapter as they are") from None
    for path in sorted({path for pattern in BESIDE for path in base.glob(pattern)}):
        if path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
