"""What the benchmark of the whole path does with its stages and their replies."""

import importlib
import sys

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT

SCRIPT = ROOT / "benchmarks/whole_path.py"


@pytest.fixture(scope="module")
def path():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("whole_path")
    sys.path.remove(str(SCRIPT.parent))


def test_replies_are_compared_as_a_whole_and_from_their_start(path):
    told = path.compared({"a": "abcd", "b": "x", "c": "", "d": "ab"}, {"a": "abxd", "b": "x", "c": "", "d": "abcd"})
    assert told == {"equal": 0.5, "agree_from_the_start": 0.75, "rows": 4}


def test_pairs_differ_in_one_thing(path):
    names = ["transformers bf16 adapter", "transformers bf16 merged", "vllm bf16 adapter", "vllm bf16 merged", "transformers fp32 merged"]
    assert path.pairs(names) == [
        (names[0], names[1]), (names[0], names[2]), (names[1], names[3]), (names[1], names[4]), (names[2], names[3]),
    ]  # fmt: skip


def test_a_stage_is_run_once_and_its_failure_is_told(path, tmp_path):
    stage = path.Stages(tmp_path)
    (tmp_path / "there").touch()
    stage("train", tmp_path / "there", "no_such_script.py")
    with pytest.raises(UserError, match=r"^train failed with exit code 2 \(.*No such file.*\): the whole log is"):
        stage("train", tmp_path / "not there", "no_such_script.py")
