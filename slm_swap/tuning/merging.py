"""An adapter merged into its base model: a checkpoint of its own, for engines that take no adapters."""

import shutil
from pathlib import Path
from typing import Any

from slm_swap.clients.endings import reply_ends
from slm_swap.clients.loading import files_hash, load_model, load_tokenizer, require_base, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, now, read_json, sha256_file, write_json
from slm_swap.common.settings import display_path
from slm_swap.tuning.record import INFO

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DTYPES = ("bf16", "fp32")


def merge_adapter(base: Path, adapter: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Write `base` with the weights of `adapter` added to its own into the folder `out`: all of it or nothing.

    Gives its `training_info.json`: that of the adapter, whose training seconds are the checkpoint's too, and what was merged.

    Raises:
        UserError: `out` is there already or cannot be written; the adapter is not one of this base.
    """
    if out.exists():
        raise UserError(f"{display_path(out)} exists already: choose another --out, or delete it")
    weights = next((adapter / name for name in WEIGHTS if (adapter / name).exists()), None)
    if weights is None:
        raise UserError(f"no weights in {display_path(adapter)} ({' or '.join(WEIGHTS)}): train the adapter again")
    info = read_json(adapter / INFO, "train_unsloth.py") if (adapter / INFO).exists() else {}
    found = files_hash(base)
    require_base(adapter, base, found, "pass its base with --model")
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)  # first: a place that cannot be written is told of at once
        model = with_adapter(load_model(base, dtype, device_map={"": "cpu"}), adapter, base).merge_and_unload(safe_merge=True)
        tokenizer = load_tokenizer(base)
        # other servers go by this file alone
        model.generation_config.eos_token_id = sorted(reply_ends(tokenizer, model.generation_config.eos_token_id, getattr(model.config, "eos_token_id", None)))
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        info["merged"] = {
            "created_at": now(),
            "adapter": {"path": display_path(adapter), "sha256": sha256_file(weights)},
            "base_model": {"path": display_path(base), "files_sha256": found},
            "dtype": dtype,
            "code": code_version(),
        }
        write_json(staged / INFO, info)
        staged.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {display_path(out)} ({error.strerror or error}): choose another place with --out") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return info
