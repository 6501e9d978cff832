"""Evaluation by several processes, each with a replica of the tiny model: the report of one process, whatever happens to them."""

import json
import os
import shutil
import signal
import subprocess
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slm_swap.clients.replicas as module
from slm_swap.clients.loading import files_hash, load_model
from slm_swap.clients.protocol import Reply
from slm_swap.clients.replicas import Replicas, about, answer, take_one_gpu
from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, Launch
from slm_swap.evaluating.journal import journal_path
from slm_swap.rows.prompts import Request
from tests.support.local_runs import ROWS, flags, outcome
from tests.support.processes import PATIENCE, Script, children_of, commands_path, free_port, wait_until

EVAL = PACKAGE / "01_eval/eval.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, ROWS)
    return path


def environment(rank: int = 0, world: int = 1, port: int = 0) -> dict[str, str]:
    told = {"LANGFUSE_DISABLED": "1", "SLM_MODEL_PATH": "models/phi-tiny", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return told | ({name: str(value) for name, value in ranks.items()} if world > 1 else {})


def start(folder: Path, world: int, argv: list, **changed: dict[str, str]) -> list[Script]:
    """The ranks' processes, as a launcher would start them; `changed` by rank is other environment, as rank1={...}."""
    port = free_port() if world > 1 else 0
    told = [environment(rank, world, port) | changed.get(f"rank{rank}", {}) for rank in range(world)]
    return [Script(EVAL, *argv, log=folder / f"log{rank}", **variables) for rank, variables in enumerate(told)]


def finish(processes: list[Script]) -> list[int]:
    return [process.wait() for process in processes]


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """What one process makes of the rows."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(folder, 1, flags(rows, folder / "out.json"))) == [0], (folder / "log0").read_text()
    return outcome(folder / "out.json")


def test_three_processes_end_in_the_report_of_one(tmp_path, rows, whole):
    out = tmp_path / "three/out.json"
    assert finish(start(tmp_path, 3, flags(rows, out, "--batch-size", 8))) == [0, 0, 0], (tmp_path / "log0").read_text()
    assert outcome(out) == whole
    assert [(tmp_path / f"log{rank}").read_text() for rank in (1, 2)] == ["", ""], "only rank 0 prints"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.json", "out.rows.jsonl"]


@pytest.mark.parametrize("known", [True, False])
def test_what_an_adapter_was_trained_on_is_told_as_by_one_process(tmp_path, rows, known):
    """compare goes by it, and where it is not known, that is said."""
    from peft import LoraConfig, get_peft_model

    base = PACKAGE / "models/phi-tiny"
    tuned = get_peft_model(load_model(base, "fp32", {"": "cpu"}), LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    if known:
        write_json(tmp_path / "adapter/training_info.json", {"base_model": {"files_sha256": files_hash(base)}})
    told, said = [], []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        words = flags(rows, folder / "out.json", "--adapter", tmp_path / "adapter", "--limit", 4)
        assert finish(start(folder, world, words)) == [0] * world, (folder / "log0").read_text()
        told.append(outcome(folder / "out.json")[0]["model"])
        said.append((folder / "log0").read_text().count("is not proven"))
    assert told[0] == told[1] and told[0]["trained_on_sha256"] == (files_hash(base) if known else None)
    assert said == [not known] * 2


def test_killed_with_all_processes_it_goes_on_with_another_number_of_them(tmp_path, rows, whole):
    out = tmp_path / "killed/out.json"
    journal = journal_path(out)
    processes = start(tmp_path, 2, flags(rows, out))
    answered(journal, 16)
    for process in processes:
        process.kill()
    finish(processes)
    kept = journal.read_bytes().count(b'"row"')
    assert 16 <= kept < len(ROWS)
    assert finish(start(tmp_path, 3, flags(rows, out))) == [0, 0, 0]
    assert outcome(out) == whole and json.loads(out.read_text())["sessions"] == 2


def answered(journal: Path, rows: int) -> None:
    """Wait until so many rows are in the journal."""
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b'"row"') >= rows)


def test_a_process_that_dies_ends_the_run_and_costs_none_of_its_rows(tmp_path, rows, whole):
    out = tmp_path / "dies/out.json"
    processes = start(tmp_path, 2, flags(rows, out))
    answered(journal_path(out), 8)
    processes[1].kill()
    assert finish(processes) == [2, -signal.SIGKILL]
    said = (tmp_path / "log0").read_text()
    assert "error: rank 1 has ended (what it said stands above): run the same command again to go on" in said
    assert "rows are answered and kept: the same command continues from there" in said
    assert finish(start(tmp_path, 1, flags(rows, out))) == [0] and outcome(out) == whole


@pytest.mark.parametrize(("rank", "sent", "code", "said"), [(0, signal.SIGINT, 130, "interrupted"), (1, signal.SIGKILL, 2, "error: rank 1 has ended")])
def test_rank_0_ends_in_order_in_the_middle_of_a_batch(tmp_path, rows, rank, sent, code, said):
    """With the interpreter's own end, in which threads that go on would crash. One batch takes longer than the rest."""
    out, unwinds = tmp_path / "out.json", {"FORK_UNWINDS": "1"}
    processes = start(tmp_path, 2, flags(rows, out, "--batch-size", 4, "--max-new-tokens", 512), rank0=unwinds, rank1=unwinds)
    answered(journal_path(out), 4)
    processes[rank].send_signal(sent)
    codes, heard = finish(processes), (tmp_path / "log0").read_text()
    assert codes[0] == code and said in heard and "terminate called" not in heard, heard
    assert "rows are answered and kept: the same command continues from there" in heard
    assert rank == 1 or codes[1] == 0


def served(client) -> tuple[Connection, threading.Thread]:
    """A connection to a replica in a thread, which ends with it."""
    here, there = Pipe()

    def work():
        there.send(about(client))
        with pytest.raises(EOFError):
            answer(client, there)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return here, thread


class Echo:
    """Says each row's text again."""

    load_seconds = 0.0

    def __init__(self, **state):
        self.identity, self.trained, self.warning, self.told = {"device": "cpu", "files_sha256": "ab"}, {}, None, state

    def stream(self, rows, answered=()):
        for index, messages in rows:
            if index not in answered:
                yield index, Reply(messages.messages[0]["content"])

    def state(self):
        return dict(self.told)

    def restore(self, state):
        self.told = state


def test_what_fails_in_a_rank_is_told_before_it_ends():
    """A launcher ends rank 0 as soon as another rank has ended."""

    class Failing(Echo):
        def stream(self, rows, answered=()):
            for index, _ in rows:
                raise UserError(f"row {index} does not fit")
            yield

    (fine, _), (failing, thread) = served(Echo()), served(Failing())
    replicas = Replicas([fine, failing], lambda seconds: None)
    with pytest.raises(UserError, match="rank 1: row 1 does not fit"):
        list(replicas.stream([(0, Request([{"content": "a"}])), (1, Request([{"content": "b"}]))]))
    thread.join(0.3)
    assert thread.is_alive()
    replicas.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()


class Store(dict):
    """A launcher's store, as far as replicas go."""

    set = dict.__setitem__


@pytest.mark.parametrize("ended", [True, False])
def test_a_rank_that_does_not_come_is_named(monkeypatch, ended):
    """Also where rank 0's own replica has ended by then."""
    here, there = Pipe()
    if ended:
        there.close()
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module, "_store", Store)
    with pytest.raises(UserError, match=r"not connected within 0\.2 s: rank 1, 2: see"):
        module.open_replicas(Launch(0, 3, replica=here), None, lambda seconds: None, len)


def test_a_replica_that_ends_before_the_rows_come_is_told_of(monkeypatch):
    here, there = Pipe()
    there.close()
    monkeypatch.setattr(module, "_store", Store)
    with pytest.raises(UserError, match="rank 0 has ended"):
        module.open_replicas(Launch(0, 1, replica=here), None, lambda seconds: None, len)


def test_what_a_replica_sent_does_not_hide_that_it_has_ended():
    here, there = Pipe()
    there.send(about(Echo()))
    replicas = Replicas([here], lambda seconds: None)
    there.send((0, Reply("said")))
    there.close()
    with pytest.raises(UserError, match="rank 0 has ended"):
        list(replicas.stream([(0, Request([]))]))


@pytest.mark.parametrize("missing", ["launcher", "rank 0"])
def test_a_rank_that_finds_no_rank_0_ends(monkeypatch, missing):
    """On another machine: no launcher ends it."""
    for name, value in environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "PATIENCE", 1)
    if missing == "rank 0":
        monkeypatch.setattr(module, "_store", lambda: {"port": free_port(), "key": b"secret"}, raising=True)
    with pytest.raises(UserError, match=r"rank 0 is not to be reached at 127.0.0.1"):
        module.serve(Launch(1, 2, 1, serves=True), lambda receive: None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.data())
def test_every_row_is_answered_once_however_they_are_dealt(ranks, count, ahead, taken, dealt, data):
    """But those that are answered: also where a rank says that it has taken rows before it may have more."""
    answered = data.draw(st.sets(st.integers(0, 40)))
    before = module.AHEAD, module.TAKEN, module.DEALT
    module.AHEAD, module.TAKEN, module.DEALT = max(ahead, taken), taken, dealt
    try:
        replicas = Replicas([served(Echo())[0] for _ in range(ranks)], lambda seconds: None)
        replies = list(replicas.stream(((number, Request([{"content": str(number)}])) for number in range(count)), answered))
        replicas.close()
    finally:
        module.AHEAD, module.TAKEN, module.DEALT = before
    assert sorted((index, reply.text) for index, reply in replies) == [(number, str(number)) for number in range(count) if number not in answered]


def test_the_state_is_rank_0s_but_for_what_all_of_them_count():
    """And it is there with the reply that it came up with."""

    class Halving(Echo):
        def stream(self, rows, answered=()):
            for index, _ in rows:
                self.told = {"batch_size_used": 8, "batches_halved": self.told["batches_halved"] + 1}
                yield index, Reply("said")

    clients = [Halving(batch_size_used=None, batches_halved=0) for _ in range(2)]
    replicas = Replicas([served(client)[0] for client in clients], lambda seconds: 2 * seconds)
    assert replicas.state() == {"batch_size_used": None, "batches_halved": 0}
    replicas.restore({"batch_size_used": 4, "batches_halved": 5})
    assert replicas.state() == {"batch_size_used": 4, "batches_halved": 5}
    halved = [replicas.state()["batches_halved"] for index, _ in replicas.stream(enumerate([Request([])] * 3)) if index % 2 == 0]
    assert halved[0] >= 6 and replicas.state() == {"batch_size_used": 8, "batches_halved": 8}
    assert replicas.describe() == {"device": "cpu", "files_sha256": "ab", "batch_size_used": 8, "batches_halved": 8} and replicas.cost(1, 1, 1, 3.0) == 6.0


def test_a_capture_that_failed_on_any_rank_is_in_the_state():
    clients = [Echo(batches_halved=1), Echo(batches_halved=0, capture_error="RuntimeError: why")]
    replicas = Replicas([served(client)[0] for client in clients], lambda seconds: None)
    list(replicas.stream(enumerate([Request([{"content": "a"}])] * 2)))
    assert replicas.state() == {"batches_halved": 1, "capture_error": "RuntimeError: why"}


def test_all_of_them_forget_and_go_on():
    class Forgetful(Echo):
        forgotten = 0

        def forget(self):
            self.forgotten += 1

    clients = [Forgetful() for _ in range(3)]
    replicas = Replicas([served(client)[0] for client in clients], lambda seconds: None, count=len)
    replicas.forget()
    assert sorted(replicas.stream((n, Request([{"content": str(n)}])) for n in range(6))) == [(n, Reply(str(n))) for n in range(6)]
    replicas.forget()
    assert replicas.generate([Request([{"content": "a"}])]) == [Reply("a")]
    assert clients[0].forgotten == 2 and replicas.count_tokens("four") == 4
    replicas.close()


def test_when_rank_0_dies_the_others_end(tmp_path, rows):
    """Its replica, which no launcher knows of, too."""
    processes = start(tmp_path, 2, flags(rows, tmp_path / "out.json"))
    answered(journal_path(tmp_path / "out.json"), 8)
    (replica,) = children_of(processes[0].pid)
    processes[0].kill()
    assert finish(processes) == [-signal.SIGKILL, 0]
    wait_until(lambda: not Path(f"/proc/{replica}/exe").exists())  # a zombie has none


def test_rank_0_says_what_another_one_lacks(tmp_path, rows):
    processes = start(tmp_path, 2, flags(rows, tmp_path / "out.json"), rank1={"SLM_MODEL_PATH": "models/none"})
    assert finish(processes) == [2, 0]
    assert "error: rank 1: no checkpoint at models/none" in (tmp_path / "log0").read_text()
    assert (tmp_path / "log1").read_text() == "" and not journal_path(tmp_path / "out.json").exists()


def test_mistakes_are_said_once(tmp_path, rows):
    for argv, said in (
        (["--track", "structured", "--model-kind", "azure"], "only the local model uses several processes"),
        (["--track", "none"], "invalid choice: 'none'"),
    ):
        assert finish(start(tmp_path, 2, argv)) == [2, 2]
        assert said in (tmp_path / "log0").read_text() and (tmp_path / "log1").read_text() == ""


def launched(words: list, **told: str) -> subprocess.Popen:
    """A launcher's process, in the package's folder as documented."""
    return subprocess.Popen(
        [str(word) for word in words], cwd=PACKAGE, env=os.environ | environment() | {"PATH": commands_path()} | told,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_wrapper_starts_a_process_for_each_gpu_that_seems_to_be_there(tmp_path, rows, whole):
    out = tmp_path / "wrapper/out.json"
    process = launched(["./eval_parallel.sh", *flags(rows, out)], CUDA_VISIBLE_DEVICES="0,1")
    said, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert outcome(out) == whole and said.count("report: ") == 1


def test_accelerate_starts_it_on_several_machines(tmp_path, rows, whole):
    """Both are this one; without a GPU the documented configuration's processes work on the CPU."""
    port, out = free_port(), tmp_path / "machines/out.json"
    launch = ["accelerate", "launch", "--config_file", "accelerate_config/phi4_2gpu.yaml", "--num_machines", 2, "--main_process_ip", "127.0.0.1"]
    launch += ["--main_process_port", port, "--machine_rank"]
    machines = [launched([*launch, rank, "01_eval/eval.py", *flags(rows, out)]) for rank in range(2)]
    heard = [machine.communicate(timeout=PATIENCE) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], heard
    assert outcome(out) == whole and [said.count("report: ") for said, _ in heard] == [1, 0]


@pytest.mark.parametrize(
    ("visible", "rank", "taken"),
    [(None, 1, "1"), ("2,3", 0, "2"), ("2,3", 1, "3"), ("2,3", 2, ""), ("GPU-ab,GPU-cd", 1, "GPU-cd"), ("", 1, "")],
)
def test_each_process_sees_one_gpu(visible, rank, taken, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    take_one_gpu(Launch(rank, 4, rank))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


def test_prompts_that_do_not_fit_are_refused_without_end(tmp_path, monkeypatch):
    """More rows in a stretch than a rank is ever given ahead: the engine waits for prompts that it can take, and gets on."""
    from slm_swap.clients.engines import transformers_engine
    from slm_swap.common.settings import Settings
    from slm_swap.slm_client import SLMClient

    monkeypatch.setattr(module, "AHEAD", 32)
    monkeypatch.setattr(module, "TAKEN", 4)
    monkeypatch.setattr(transformers_engine, "WINDOW", 16)
    client = SLMClient(Settings(slm_model_path="models/phi-tiny"), precision="fp32", max_new_tokens=3)
    monkeypatch.setattr(client.engine, "context", 120)
    rows = [(n, Request([{"role": "user", "content": "Say it" + (" again" * 300 if n % 10 else "")}])) for n in range(300)]
    replicas = Replicas([served(client)[0]], lambda seconds: None)
    replies = dict(replicas.stream(rows, answered={0}))
    replicas.close()
    assert sorted(replies) == list(range(1, 300))
    assert sum(reply.error is not None for reply in replies.values()) == 270


def test_ranks_of_different_models_do_not_work_together(tmp_path, rows):
    other = tmp_path / "other"
    shutil.copytree(PACKAGE / "models/phi-tiny", other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"top_k": 7}))
    assert finish(start(tmp_path, 2, flags(rows, tmp_path / "out.json"), rank1={"SLM_MODEL_PATH": str(other)}))[0] == 2
    assert "error: rank 1 has another model than rank 0 (files_sha256)" in (tmp_path / "log0").read_text()
