"""What the documents say is done: their commands parse, the row shown is read, and the three commands for own logs run."""

import json
import re
import shlex

import pytest

from slm_swap.common.reports import read_json
from slm_swap.common.settings import PACKAGE, ROOT
from slm_swap.dataset.readers.chat import chat
from slm_swap.dataset.readers.sources import Seen
from slm_swap.dataset.row import REASONS
from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.demo.quickstart import OWN_ROWS
from slm_swap.rows.examples import FIELDS, read_examples
from slm_swap.scoring.metrics import ERRORS
from tests.support.scripts import load_script
from tests.support.shop_bot import write_log

README, WORKFLOW, PLAYBOOK, LANGFUSE = ROOT / "README.md", PACKAGE / "README.md", PACKAGE / "agent.md", ROOT / "docs/langfuse.md"
DOCUMENTS = (README, WORKFLOW, PLAYBOOK, *sorted((ROOT / "docs").glob("*.md")))
KEY = "key-of-the-simulator"


def section(path, title):
    return path.read_text(encoding="utf-8").split(f"# {title}\n")[1].split("\n## ")[0]


def commands(text):
    """The commands of a document that start a script of this project: (its path, its flags)."""
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]*)`", text)
    split = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [(words[1], words[2:]) for words in split if (PACKAGE / words[1]).is_file() and "..." not in words]


def anchors(path):
    """What links may name of a document: its headings as GitHub and others write them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_every_link_of_a_document_leads_somewhere(path):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", path.read_text(encoding="utf-8")):
        target = path.parent / name if name else path
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), (name, anchor)


def test_the_quickstart_ends_with_the_commands_of_the_readme():
    block = section(README, "Your own logs in three commands").split("```")[1]
    assert OWN_ROWS.splitlines() == [line.partition("#")[0].strip() for line in block.strip().splitlines()]


@pytest.mark.parametrize("path", [README, WORKFLOW, PLAYBOOK, LANGFUSE], ids=str)
def test_every_command_of_a_document_is_taken(path):
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    for script, flags in found:
        place = "04_ft/train_unsloth.py" if script == "train_unsloth.py" else script
        load_script(place).parse_args(flags)


def test_the_row_shown_is_read(tmp_path):
    [shown] = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(shown)) + "\n", encoding="utf-8")
    [example] = read_examples(path)
    assert [call["arguments"] for call in example.calls] == [{"order": 41}, {"order": 42}]
    [row] = chat([path], Seen())
    assert row.track == "toolcall" and row.group == "3f0c" and row.gold == example.calls


def test_the_three_commands_take_a_log_to_its_verdict(tmp_path, run_script, monkeypatch):
    """The hosted model is always right and the small one always wrong; both are asked over sockets, as the log's production was."""
    (prepare, read), (live, asked), (compare, decided) = commands(section(README, "Your own logs in three commands"))
    reports, log = tmp_path / "reports", write_log(tmp_path / "our_logs.jsonl", 600)
    read = [str(log) if word == "our_logs.jsonl" else word for word in read]
    code, said, _ = run_script(load_script(prepare), *read, "--out-dir", tmp_path)
    assert code == 0 and re.search(r"replies that can be measured +100.0% \(600 of 600\)", said)
    assert "100.0% (600 of 600)" in README.read_text(encoding="utf-8")
    examples = read_examples(tmp_path / "toolcall/test.jsonl")
    with AzureSimulator(examples, key=KEY) as hosted, AzureSimulator(examples, key=KEY, mistake_rate=1.0) as small:
        for name, value in {"ENDPOINT": hosted.url, "DEPLOYMENT": "simulator", "API_KEY": KEY, "API_VERSION": "2024-10-21"}.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        monkeypatch.setenv("SLM_BASE_URL", f"{small.url}/v1")
        monkeypatch.setenv("SLM_API_KEY", KEY)
        code, _, error = run_script(load_script(live), *asked, "--dataset", tmp_path / "toolcall/test.jsonl", "--out-dir", reports)
        assert code == 0, error
    told = read_json(reports / "toolcall_azure_test_live.json", "")
    assert told["ask"] == "native" and told["metrics"]["args_exact_rate"] == told["metrics"]["decision_match_rate"] == 1.0
    decided = [word.replace("01_eval/reports", str(reports)) for word in decided]
    code, said, error = run_script(load_script(compare), *decided, "--out", tmp_path / "decision.json")
    assert code == 10 and "VERDICT=FINE_TUNE" in said, error


def test_the_workflow_names_every_field_reason_and_error():
    text = WORKFLOW.read_text(encoding="utf-8") + LANGFUSE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert named >= FIELDS and REASONS.keys() <= named and set(ERRORS) <= named
