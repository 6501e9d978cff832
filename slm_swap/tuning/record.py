"""What an adapter's folder tells of its making."""

import json
import shutil
from pathlib import Path
from typing import Any

from slm_swap.clients.loading import files_hash
from slm_swap.common.os_errors import writing
from slm_swap.common.reports import write_json, write_jsonl
from slm_swap.common.settings import display_path
from slm_swap.tuning.checkpoints import GO_ON, Checkpoints
from slm_swap.tuning.untrained import trained_tokens

INFO, LOG, PLOT = "training_info.json", "training_log.jsonl", "training_log.png"


def peak_memory_gib() -> dict[str, float]:
    """The most memory that this process has held: on its GPU where there is one, and of the machine's own."""
    import resource
    import sys

    import torch

    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """The losses over the steps, and under them the metrics of generated replies where there are any."""
    from matplotlib.figure import Figure

    metrics = sorted({name for entry in log for name in entry if name.startswith("eval_") and name.endswith(("_rate", "_f1"))})
    figure = Figure(figsize=(7, 6 if metrics else 4), layout="constrained")
    axes = figure.subplots(2 if metrics else 1, sharex=True, squeeze=False)[:, 0]
    curves = [(axes[0], "loss", "train"), (axes[0], "eval_loss", "validation"), *((axes[-1], name, name[5:]) for name in metrics)]
    for axis, name, label in curves:
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else None, label=label)
    axes[0].set_ylabel("loss (nats a token)")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def make_alike(folder: Path) -> None:
    """The same files for the same run: PEFT writes its sets in the order of their hashes, and safetensors hides its file from the team."""
    config = folder / "adapter_config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    listed = {name: sorted(value) for name, value in told.items() if isinstance(value, list) and all(isinstance(one, str) for one in value)}
    write_json(config, told | listed)
    for file in folder.iterdir():
        file.chmod(0o644)


def save_adapter(model: Any, tokenizer: Any, out: Path, info: dict, log: list[dict], base: Path, checkpoints: Checkpoints) -> None:
    """Write the adapter beside its place, then move it there: an older adapter stays whole until the new one is."""
    staged, old = checkpoints.folder / "adapter", checkpoints.folder / "old"
    for folder in (staged, old):
        shutil.rmtree(folder, ignore_errors=True)
    with writing(out, GO_ON):
        _save(model, tokenizer, out, staged, old, info, log, base)
    checkpoints.remove()


def _save(model: Any, tokenizer: Any, out: Path, staged: Path, old: Path, info: dict, log: list[dict], base: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = display_path(base)
    model.save_pretrained(staged, save_embedding_layers=False)  # LoRA changes none; PEFT would guess
    tokenizer.save_pretrained(staged)
    make_alike(staged)
    info |= {"trained_tokens": trained_tokens(model, tokenizer), "files_sha256": files_hash(staged)}
    write_json(staged / INFO, info)
    write_jsonl(staged / LOG, (dict(sorted(entry.items())) for entry in log))
    plot(log, staged / PLOT)
    if out.exists():
        out.rename(old)
    staged.rename(out)
