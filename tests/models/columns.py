"""What is tried with a checkpoint of a family: one function a column of the table.

Each gives nothing if all is right, raises UserError if the program refuses, and AssertionError if a number is wrong. All is in fp32.
"""

import io
import json
import os
import re
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from slm_swap.cli import run
from slm_swap.clients.engines import Generated
from slm_swap.clients.loading import encode_prompts, load_tokenizer, prompt_text
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.merging import merge_adapter
from slm_swap.tuning.packing import IGNORED
from slm_swap.tuning.tokens import tokenize
from slm_swap.tuning.training import train
from tests.models.families import Family, build
from tests.models.rows import ROWS
from tests.support.scripts import load_script

TRACK = "toolcall"
ASKED = [(track, row) for track, rows in ROWS.items() for row in rows[:6]]
NEW_TOKENS = 24
TIE = 1e-4  # of the logits' spread: who is this close is as good as the best
LEARNED, HELD_OUT = ROWS[TRACK][:6], ROWS[TRACK][6:]
TRAINING = Hyperparameters(precision="fp32", lora_r=4, batch_size=2, gradient_accumulation=1, epochs=1, learning_rate=3e-2, max_length=400)
STEPS, SAVED = 3, 2  # a training is interrupted in the midst of an epoch
PACKED = replace(TRAINING, packing=True, pack_length=1200)
INPUTS = {"train": {"path": "rows.jsonl", "sha256": "0" * 64, "rows": len(LEARNED)}}


@dataclass(frozen=True)
class Made:
    """A reply: its prompt's and its own tokens, without the one that ended it."""

    prompt: list[int]
    tokens: list[int]
    stopped: bool
    text: str


class Trial:
    """One family's checkpoint in a folder of its own, and what is made of it, each once."""

    def __init__(self, family: Family, folder: Path):
        self.family, self.folder = family, folder
        self.base = build(family, folder / "model")

    @cached_property
    def alone(self) -> list[Made]:
        return reply(self.base, 1)

    @cached_property
    def replies(self) -> list[Made]:
        return reply(self.base, 8)

    @cached_property
    def tuned(self) -> list[Made]:
        return reply(self.base, 8, self.adapter)

    @cached_property
    def trained(self) -> dict[str, Any]:
        return self.train(self.folder / "adapter", TRAINING, save_steps=0)

    @property
    def adapter(self) -> Path:
        assert self.trained
        return self.folder / "adapter"

    @cached_property
    def plain(self) -> Any:
        return plain_model(self.base)

    def train(self, out: Path, parameters: Hyperparameters, **options: Any) -> dict[str, Any]:
        rows = LEARNED[: 3 if parameters.packing else None]
        with mock.patch("slm_swap.tuning.record.plot"):  # a picture takes as long as a step
            return train(TRACK, self.base, rows, HELD_OUT, out, parameters, "trl", INPUTS, **options)

    def loss_alone(self, rows: list[Example], model: Any = None) -> float:
        """The mean loss of the rows' completions, each row computed alone by transformers' own model (default: the base)."""
        model = model or self.plain
        losses = []
        for row in tokenize(load_tokenizer(self.base), TRACK, rows, TRAINING.max_length).rows:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            wanted = torch.tensor(row["labels"][1:])
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")[wanted != IGNORED])
        return torch.cat(losses).mean().item()


def plain_model(folder: Path) -> Any:
    """The checkpoint as transformers has it, by its slowest and plainest attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if hasattr(AutoConfig.from_pretrained(folder), "vision_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reply(folder: Path, batch_size: int, adapter: Path | None = None) -> list[Made]:
    """What the local model replies to ASKED."""
    settings = Settings(slm_model_path=str(folder))
    client = SLMClient(settings, precision="fp32", adapter=adapter, max_new_tokens=NEW_TOKENS, batch_size=batch_size, engine="transformers")
    made: dict[int, Generated] = {}
    generate = client.engine.generate

    def kept(*given):
        for one in generate(*given):
            made[one.index] = one
            yield one

    client.engine.generate = kept
    requests = [request_of(track, row) for track, row in ASKED]
    told = client.generate(requests)
    assert not (errors := [one.error for one in told if one.error]), errors[0]
    prompts = encode_prompts(client.tokenizer, requests)
    return [Made(prompts[at], made[at].tokens, made[at].stopped, told[at].text) for at in range(len(told))]


def wrong_tokens(model: Any, replies: list[Made], ends: set[int]) -> list[str]:
    """Where a reply is not what the model says, when prompt and reply are its one row: no padding, no cache."""
    found = []
    for at, made in enumerate(replies):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([made.prompt + made.tokens])).logits[0, len(made.prompt) - 1 :]
        best, lowest = logits.max(-1).values, logits.std(-1) * TIE
        for place, token in enumerate(made.tokens):
            if logits[place, token] < best[place] - lowest[place]:
                found.append(f"row {at}, token {place}")
                break
        else:
            if made.stopped != (int(logits[-1].argmax()) in ends) and len(made.tokens) < NEW_TOKENS:
                found.append(f"row {at}, its end")
    return found


def shrinks(replies: list[Made]) -> bool:
    """Whether half of the rows of a batch have ended before its last one."""
    ordered = sorted(replies, key=lambda made: -len(made.prompt))
    lengths = [sorted(len(made.tokens) + made.stopped for made in ordered[start : start + 8]) for start in (0, 8)]
    return any(batch[(len(batch) + 1) // 2 - 1] < batch[-1] for batch in lengths)


# -- The columns -----------------------------------------------------------------------------------------------------------------


def infer(trial: Trial) -> None:
    """infer.py prints the reply."""
    rows = trial.folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row.to_json()) + "\n" for track, row in ASKED if track == TRACK))
    flags = ["--track", TRACK, "--model-kind", "slm", "--dataset", str(rows), "--precision", "fp32", "--max-new-tokens", str(NEW_TOKENS)]
    script, out, err = load_script("01_eval/infer.py"), io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, {"SLM_MODEL_PATH": str(trial.base)}), redirect_stdout(out), redirect_stderr(err):
        try:
            run(lambda: script.main(flags))
        except SystemExit as left:
            code = left.code
    if code == 2:
        raise UserError(err.getvalue().strip().removeprefix("error: "))
    assert code == 0 and out.getvalue() == f"{trial.alone[0].text}\n", err.getvalue()


def batches(trial: Trial) -> None:
    """Batches of 8 give the replies of batches of 1, rows that end early among them."""
    alone, together = trial.alone, trial.replies
    assert alone == together, [at for at, pair in enumerate(zip(alone, together, strict=True)) if pair[0] != pair[1]]
    assert shrinks(together), "no batch goes on with half of its rows: the checkpoint's replies are to end at more different times"


def forward(trial: Trial) -> None:
    """Each reply fed back in one forward pass, alone: every token is the best one. A prompt has one beginning of text where there is one."""
    assert not (wrong := wrong_tokens(trial.plain, trial.replies, ends_of(trial))), wrong
    beginning = load_tokenizer(trial.base).bos_token_id
    if beginning is not None and beginning not in ends_of(trial):
        assert {made.prompt.count(beginning) for made in trial.replies} <= {0, 1}


def ends_of(trial: Trial) -> set[int]:
    """The tokens that are to end a reply: those of generation_config, of the tokenizer, and the one that is taught."""
    tokenizer = load_tokenizer(trial.base)
    told = json.loads((trial.base / "generation_config.json").read_text()).get("eos_token_id", [])
    return {*told, tokenizer.eos_token_id, tokenizer(trial.family.taught, add_special_tokens=False)["input_ids"][-1]}


def labels(trial: Trial) -> None:
    """What is taught is the completion and the template's end, and nothing else; what stands before it is what evaluation shows."""
    tokenizer = load_tokenizer(trial.base)
    for track, rows in ROWS.items():
        told = tokenize(tokenizer, track, rows, TRAINING.max_length)
        assert len(told.rows) == len(rows), (told.untaught, told.too_long)
        prompts = encode_prompts(tokenizer, [request_of(track, row) for row in rows])
        for row, taught, prompt in zip(rows, told.rows, prompts, strict=True):
            learned = [token for token in taught["labels"] if token != IGNORED]
            # behind its prompt, as the template writes it: some tokenizers put a space in front of a text of its own
            shown = prompt_text(tokenizer, request_of(track, row)) + trial.family.taught.format(row.completion)
            assert taught["input_ids"] == tokenizer(shown, add_special_tokens=False)["input_ids"]
            assert taught["input_ids"] == prompt + learned and taught["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def packed(trial: Trial) -> None:
    """Packed rows have the loss that they have alone, in evaluation and in the first step."""
    info = trial.train(trial.folder / "packed", PACKED)
    assert info["steps"] == 1
    close("validation", info["eval_loss"]["before"], trial.loss_alone(HELD_OUT))
    close("first step", info["train_loss"], trial.loss_alone(LEARNED[:3]))


def adapter(trial: Trial) -> None:
    """Training begins with the rows' own loss and lowers it; with the adapter, batches of 8 give the replies of batches of 1."""
    loss = trial.trained["eval_loss"]
    close("validation", loss["before"], trial.loss_alone(HELD_OUT))
    assert trial.trained["steps"] == STEPS and loss["after"] < loss["before"], loss
    assert reply(trial.base, 1, trial.adapter) == trial.tuned
    assert trial.tuned != trial.replies, "the adapter changes nothing"


def merge(trial: Trial) -> None:
    """The merged checkpoint gives the adapter's replies and loss, also in transformers alone, and has the base's other files."""
    out = trial.folder / "merged"
    merge_adapter(trial.base, trial.adapter, out, "fp32")
    assert reply(out, 8) == trial.tuned
    merged = plain_model(out)
    assert not (wrong := wrong_tokens(merged, trial.tuned, ends_of(trial))), wrong
    close("merged", trial.loss_alone(HELD_OUT, merged), trial.trained["eval_loss"]["after"])
    missing = {path.name for path in trial.base.iterdir()} - {path.name for path in out.iterdir()}
    assert not missing, missing
    assert load_tokenizer(out).chat_template == load_tokenizer(trial.base).chat_template
    named = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(named) >= ends_of(trial)


def resume(trial: Trial) -> None:
    """A training that is interrupted and goes on ends in the adapter of the uninterrupted one, to the bit."""
    out, complete = trial.folder / "resumed", Checkpoints.complete
    assert trial.trained["steps"] == STEPS

    def interrupted(*given, **options):
        complete(*given, **options)
        raise KeyboardInterrupt

    with mock.patch.object(Checkpoints, "complete", interrupted), suppress(KeyboardInterrupt):
        trial.train(out, TRAINING, save_steps=SAVED)
    assert Checkpoints(out).steps() == [SAVED] and not out.exists()
    info = trial.train(out, TRAINING, save_steps=SAVED, resume=True)
    assert info["sessions"] == 2
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, trial.adapter)]
    assert weights[0] == weights[1]


def close(what: str, found: float, wanted: float) -> None:
    assert abs(found - wanted) <= 1e-5 * wanted, f"{what}: a loss of {found}, not {wanted}"


COLUMNS = {check.__name__: check for check in (infer, batches, forward, labels, packed, adapter, merge, resume)}


def cell(trial: Trial, check: Callable[[Trial], None]) -> str:
    """"ok"; "refused: " and the program's line, with MODEL for the checkpoint's folder and ... for measured numbers; or "fault: " and what is wrong."""
    try:
        check(trial)
    except UserError as error:
        line = re.sub(r"\d+\.\d+", "...", str(error).replace(str(trial.base), "MODEL"))
        return f"fault: more than a line: {line}" if "\n" in line else f"refused: {line}"
    except Exception as error:
        traceback.print_exc()
        return f"fault: {type(error).__name__}: {error}"
    return "ok"
