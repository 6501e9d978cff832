"""A checkpoint that was damaged is passed over or refused, whatever byte it is; one that is whole is taken."""

import json
import shutil

import pytest

from slm_swap.clients.loading import files_hash
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.checkpoints import MARKER, Checkpoints
from slm_swap.tuning.merging import merge_adapter
from tests.tuning.test_resume import run

FILES = {"adapter_model.safetensors": b"weights" * 9, "optimizer.pt": b"moments", "rng_state.pth": b"dice", "trainer_state.json": b"{}"}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "adapter")
    made.open({"seed": 1}, resume=False)
    for step in (5, 10):
        made.path(step).mkdir()
        for name, content in FILES.items():
            (made.path(step) / name).write_bytes(content + b"%d" % step)
        made.complete(step, {"z": 0.1, "step": step})
    assert made.latest() == (made.path(10), {"z": 0.1, "step": 10})
    return made


def damaged(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, MARKER])
def test_a_flipped_bit_anywhere_leads_to_the_checkpoint_before(checkpoints, name):
    path = checkpoints.path(10) / name
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        damaged(path, at)
        said = []
        assert checkpoints.latest(said.append) == (checkpoints.path(5), {"z": 0.1, "step": 5}), at
        assert said == [f"checkpoint-10 is damaged ({name}) and is passed over"]
        with pytest.raises(UserError, match=f"checkpoint-10, the best step's, is damaged .{name}"):
            checkpoints.require_whole(10)
        path.write_bytes(whole)
    assert checkpoints.latest() == (checkpoints.path(10), {"z": 0.1, "step": 10})


@pytest.mark.parametrize("harm", ["cut", "zeros", "missing", "another", "marker is no JSON"])
def test_other_damage_too(checkpoints, harm):
    path = checkpoints.path(10) / "optimizer.pt"
    if harm == "missing":
        path.unlink()
    elif harm == "another":
        (path.parent / "scheduler.pt").write_bytes(b"")
    elif harm == "marker is no JSON":
        (path.parent / MARKER).write_bytes(b"\0" * 99)
    else:
        path.write_bytes(path.read_bytes()[:3] if harm == "cut" else b"\0" * len(path.read_bytes()))
    assert checkpoints.latest() == (checkpoints.path(5), {"z": 0.1, "step": 5})


def test_where_all_are_damaged_nothing_is_trained(checkpoints):
    for step in (5, 10):
        damaged(checkpoints.path(step) / "optimizer.pt", 3)
    with pytest.raises(UserError, match=r"every checkpoint in .*adapter.checkpoints is damaged: delete that folder"):
        checkpoints.latest()


def test_a_damaged_or_changed_adapter_is_neither_evaluated_nor_merged(tmp_path):
    out, base = tmp_path / "adapter", PACKAGE / "models/phi-tiny"
    run(out)
    info, weights = json.loads((out / "training_info.json").read_text()), out / "adapter_model.safetensors"
    assert info["files_sha256"] == files_hash(out) and {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    SLMClient(Settings(slm_model_path=str(base)), precision="fp32", adapter=out).close()
    whole = weights.read_bytes()
    damaged(weights, len(whole) - 5)
    for use in (
        lambda: SLMClient(Settings(slm_model_path=str(base)), precision="fp32", adapter=out),
        lambda: merge_adapter(base, out, tmp_path / "merged", "fp32"),
    ):
        with pytest.raises(UserError, match=r"the files of .*adapter do not match its training_info.json"):
            use()
    weights.write_bytes(whole)
    merge_adapter(base, out, tmp_path / "merged", "fp32")
    SLMClient(Settings(slm_model_path=str(tmp_path / "merged")), precision="fp32").close()
    shutil.copy(tmp_path / "merged/generation_config.json", tmp_path / "merged/another.json")
    with pytest.raises(UserError, match="merged do not match"):
        SLMClient(Settings(slm_model_path=str(tmp_path / "merged")), precision="fp32")


def test_a_kill_while_they_are_removed_leaves_no_run_that_cannot_go_on(checkpoints, monkeypatch):
    """The adapter is in its place by then, and the same command is to work: whatever of the folder goes first."""

    def killed(folder, **_):
        (folder / "run.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.remove()
    again = Checkpoints(checkpoints.folder.with_name("adapter"))
    again.open({"seed": 1}, resume=True)
    assert again.latest() is None and [path.name for path in again.folder.iterdir() if path.is_dir()] == []
