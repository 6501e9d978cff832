"""The HTML report: what it shows, that nothing in it acts, that everybody can read it; with headless Chromium."""

import base64
import html
import json
import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import SYSTEM_PROMPTS, toolcall_prompt
from slm_swap.verdict.decision import FINE_TUNE, NEED_MORE_DATA, SWAP
from slm_swap.verdict.html_report import plots, words
from slm_swap.verdict.html_report.decision_file import open_rows, read_decision
from slm_swap.verdict.html_report.page import csp_hash, write_page
from slm_swap.verdict.html_report.sent import Texts, sent
from slm_swap.verdict.html_report.text import MOST_COMPARISONS, all_visible, embedded_json, one_line, visible, word_diff
from slm_swap.verdict.html_report.view import Page
from tests.support.decision_files import MADE, TRACK, call, make_cost, make_decision, make_rows
from tests.support.scripts import load_script

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")
SVG = re.compile(r"data:image/svg\+xml;base64,[\w+/=]+")
HOSTILE = (
    "<script>window.ran=1</script>",
    "</script><script>window.ran=2</script>",
    "<!--<script>",
    "<img src=x onerror=window.ran=3>",
    '"><svg/onload=window.ran=4>',
    "' onfocus=window.ran=5 autofocus x='",
    "javascript:window.ran=6",
    "{{7*7}} {% raw %} ${7*7} <%= 7*7 %>",
    "\x1b[31mred\x1b[0m \x00\x07",
    "abc\u202egnp.exe\u2066\u200bx\ufeff",
    "line\u2028separator\u2029end",
    "half \ud800 a pair",
    "]]>&lt;b&gt;&amp; $x^2$ $\\frac{1}{0}$",
    "<style>*{display:none}</style><meta http-equiv=refresh content='0;url=https://example.com'>",
    "<iframe src=https://example.com></iframe><link rel=stylesheet href=https://example.com/x.css>",
    "constructor",
)


@pytest.fixture(scope="session")
def render_script():
    return load_script("03_compare/render_report.py")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a page as a person would: (page, everything that it complained of or asked the network for)."""
    contexts = []

    def open_it(path: Path, width: int = 1280, theme: str = "light", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, **options))
        page, heard = contexts[-1].new_page(), []
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: heard.append(f"request: {request.url}") if not is_own(request.url, path) else None)
        page.on("requestfailed", lambda request: heard.append(f"failed: {request.failure}"))
        page.goto(path.as_uri(), wait_until="load")
        return page, heard

    yield open_it
    for context in contexts:
        context.close()


def is_own(url: str, path: Path) -> bool:
    return url == path.as_uri() or url.startswith("data:")


def render(decision: Path) -> Path:
    out = decision.with_suffix(".html")
    with out.open("w", encoding="utf-8") as stream:
        stream.writelines(write_page(read_decision(decision)))
    return out


@pytest.fixture(scope="module")
def drawn() -> dict:
    """The pictures so far, by all that was drawn in them, with what drew them."""
    return {}


@pytest.fixture
def draw_once(drawn, monkeypatch):
    """For tests of pages whose plots are mostly those of pages before: a plot is drawn once. That equal numbers give equal plots
    is tested with plots that are all drawn."""
    draw_anew = plots.svgs

    def svgs(draw):
        key = draw.__qualname__, repr([cell.cell_contents for cell in draw.__closure__])
        if key not in drawn:
            drawn[key] = draw, draw_anew(draw)
        return drawn[key][1]

    monkeypatch.setattr(plots, "svgs", svgs)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """The page of a decision that has every part, of 120 rows."""
    return render(make_decision(tmp_path_factory.mktemp("full")))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The same with hostile text wherever a decision and its rows hold text."""
    examples, azure, slm = make_rows(2 * len(HOSTILE))
    for number, text in enumerate(HOSTILE):
        examples[number] = Example(text, call("a", {}), examples[number].id)
        hashed = text_hash(text.encode("utf-8", "replace").decode())
        for line in (azure[number], slm[number]):
            line |= {
                "id": f"{text} {number}",
                "group": text,
                "reference": text,
                "error": text,
                "reply_error": text,
                "prompt_sha256": hashed,
            }
            line["scores"] = dict.fromkeys(line["scores"], 0.0)
        azure[number]["reply"], slm[number]["reply"] = f"{text} {text}", text
    return render(make_decision(tmp_path_factory.mktemp("hostile"), change=poison, lines=(examples, azure, slm)))


STRUCTURE = {"stage", "track", "verdict", "question", "guarantee", "withheld", "towards", "verdict_without", "path", "rows_path", "sha256", "rows_sha256", "id", "ask"}


def poison(decision: dict) -> None:
    """Hostile text for every string that says nothing to the program, in turn, and for the names of a metric and a matcher."""
    texts = iter(HOSTILE * 1000)

    def poisoned(value, key=""):
        if isinstance(value, dict):
            return {name: poisoned(child, name) for name, child in value.items()}
        if isinstance(value, list):
            return [poisoned(child, key) for child in value]
        return next(texts) if isinstance(value, str) and key not in STRUCTURE else value

    decision |= poisoned(decision)
    for part in (decision["metrics"], decision["matchers"], decision["sequential"]["certain_at"]):
        part |= {text: next(iter(part.values())) for text in HOSTILE}


# -- Text ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本 مرحبا 😀", "plain é 日本 مرحبا 😀"),
        ("tab\tline\n\u3000", "tab\tline\n\u3000"),
        ("\x1b[31m\x00\r", "\\u001b[31m\\u0000\\u000d"),
        ("\u202e\u2066\u200b\u200f\ufeff\u00ad\u2028", "\\u202e\\u2066\\u200b\\u200f\\ufeff\\u00ad\\u2028"),
        ("no\u00a0break", "no\\u00a0break"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_acts_is_made_visible(text, shown):
    assert visible(text) == shown and all_visible({text: [text, 1, None]}) == {shown: [shown, 1, None]}


@given(st.text(st.characters()))
def test_nothing_acts_once_it_is_visible(text):
    shown = visible(text)
    assert all(char.isprintable() or char in "\n\t\u3000" for char in shown) and visible(shown) == shown
    shown.encode("utf-8")


@given(st.dictionaries(st.text(max_size=20), st.lists(st.text(max_size=20) | st.integers() | st.none(), max_size=5), max_size=5))
def test_embedded_json_is_the_value_and_leaves_no_element(value):
    value = all_visible(value)
    text = embedded_json(value)
    assert json.loads(text) == value and not set("<>&\u2028\u2029") & set(text)


@pytest.mark.parametrize(
    ("reference", "reply", "parts"),
    [
        ("a b c", "a x c", ["a ", "b", "x", " c"]),
        ("same", "same", ["same"]),
        ("", "", []),
        ("gone", "", ["", "gone"]),
        ("", "new", ["", "", "new"]),
        ('{"a":1}', '{"a":12}', ['{"a":', "1", "12", "}"]),
        ("a  b", "a b", ["a", "  ", " ", "b"]),
        ("one two", "one two three", ["one two", "", " three"]),
        ("x y", "z x y", ["", "", "z ", "x y"]),
        ("a b c d", "a c d e", ["a ", "b ", "", "c d", "", " e"]),
    ],
)
def test_a_word_diff(reference, reply, parts):
    assert word_diff(reference, reply) == parts


def put_together(parts: list[str]) -> tuple[str, str]:
    return "".join(p for at, p in enumerate(parts) if at % 3 != 2), "".join(p for at, p in enumerate(parts) if at % 3 != 1)


WORDY = st.lists(st.sampled_from(["a", "b", " ", "\n", '"', "{", "é"])).map("".join) | st.text()


@given(WORDY, WORDY)
def test_both_texts_can_be_put_together_from_a_diff(reference, reply):
    parts = word_diff(reference, reply)
    assert put_together(parts) == (reference, reply) and (not parts or parts[-1])


def test_texts_too_long_to_compare_are_wholly_replaced():
    reference, reply = (f"start {word * 1000}end" for word in ("a ", "b "))  # 1,000 words, 1,000 spaces
    assert MOST_COMPARISONS < 1999 * 1999
    assert word_diff(reference, reply) == ["start ", ("a " * 1000)[:-1], ("b " * 1000)[:-1], " end"]


@pytest.mark.parametrize(("text", "shown"), [("a\n b", "a b"), ("abcdef", "abcd…"), ("abcde", "abcde"), ("abc def", "abc…")])
def test_one_line(text, shown):
    assert one_line(text, 5) == shown


# -- Words -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "signed", "standing"),
    [
        (0.0321, "+3.2", "3.2 points behind"),
        (-0.5, "−50.0", "50.0 points ahead"),
        (0.0004, "0.0", "level"),
        (-0.0004, "0.0", "level"),
    ],
)
def test_points(difference, signed, standing):
    assert (words.signed(difference), words.standing(difference)) == (signed, standing)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (1234.4, "1,234"), (12.3, "12.30"), (0.0421, "0.042"), (0.00000123, "1.2e-06"), (1, "1.00"), (99.999, "100.00")],
)
def test_amounts(number, shown):
    assert words.significant(number) == shown


def test_numbers_with_units():
    assert (words.count(1, "rows"), words.count(1234.6, "rows"), words.count(0, "rows")) == ("1 row", "1,235 rows", "0 rows")
    assert [words.duration(s) for s in (0.34, 45, 600, 5400)] == ["0.34 s", "45 s", "10 min", "1.5 h"]
    assert [words.short(n) for n in (0.05, 800, 1500, 2.5e6, 3e9)] == ["0.05", "800", "1.5k", "2.5M", "3B"]
    assert words.range_of(0.03, [-0.01, 0.07]) == "+3.0 (−1.0 to +7.0)" and words.range_of(0.03, None) == "+3.0"
    assert words.rate_of(0.912, [0.88, 0.935]) == "91.2% (88.0 to 93.5)" and words.rate_of(1, None) == "100.0%"


def test_every_metric_error_and_matcher_has_words():
    from slm_swap.scoring.metrics import ERRORS, MATCHERS
    from slm_swap.scoring.tracks import TRACKS

    gates = [TRACKS["structured"].gate, TRACKS["toolcall"].with_metrics(["decision_match_rate"]).gate]
    assert {name for gate in gates for name in gate} == set(words.METRICS)
    assert all(len(name) <= 21 for name in [*words.ERROR_KINDS.values(), *(name for name, _ in words.METRICS.values())])  # a phone's line
    assert set(ERRORS) <= set(words.ERROR_KINDS) and tuple(words.MATCHERS) == MATCHERS


# -- Decisions -------------------------------------------------------------------------------------------------------------------


def test_rows_are_put_side_by_side(tmp_path):
    examples, azure, slm = make_rows(4, misses=(0, 0))
    azure[1]["reply"], slm[2]["reply"] = "no", ""
    for line, error in ((azure[1], "no_json"), (azure[3], "wrong_value"), (slm[2], "filtered"), (slm[3], "truncated")):
        line |= {"error": error, "scores": line["scores"] | {TRACK.exact: 0.0}}
    slm[2] |= {"finish_reason": "content_filter"}
    azure[3] |= {"finish_reason": "error", "reply_error": "timeout"}
    azure[0]["group"] = None

    def change(decision):
        decision["gold_audit"]["rows"] = [{"id": "row-00003", "reference": "a", "reply": "b"}]
        decision["before"] |= {"worse": ["row-00002"], "better": ["row-00000", "row-00003"]}
        decision |= {"groups": None, "clusters": {"by": "row", "count": 4, "effective": 4}}

    found = list(open_rows(read_decision(make_decision(tmp_path, lines=(examples, azure, slm), change=change))))
    assert [row["id"] for row in found] == [example.id for example in examples]
    assert [(row["azure"]["right"], row["slm"]["right"]) for row in found] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]
    assert [row["slm"]["error"] for row in found] == [None, None, "filtered", "truncated"]
    assert [row["marks"] for row in found] == [["mended"], [], ["broken"], ["reference", "mended"]]
    assert [row["sent"][0][1][-1][1] for row in found] == [example.prompt for example in examples]
    assert (
        found[0]["group"] in examples[0].completion and found[1]["group"] == examples[1].group
    )  # the tool stands in for no group
    assert (found[2]["slm"]["ended"], found[3]["azure"]["ended"]) == ("content_filter", "timeout") and "ended" not in found[0][
        "slm"
    ]
    assert put_together(found[1]["azure"]["diff"]) == (examples[1].completion, "no")


def test_rows_are_grouped_as_the_decision_compares_them(tmp_path):
    lines = make_rows(3)
    for line in lines[1] + lines[2]:
        line["group"] = "query-1"
    groups = {}
    for by in ("tool", "group"):
        change = lambda decision, by=by: decision["groups"].update(by=by)  # noqa: E731
        groups[by] = {row["group"] for row in open_rows(read_decision(make_decision(tmp_path, change=change, lines=lines)))}
    assert groups == {"tool": {example.group for example in lines[0]}, "group": {"query-1"}}


def test_prompts_are_shown_only_from_the_dataset_that_was_compared(tmp_path):
    decision = read_decision(make_decision(tmp_path, 3))
    with (tmp_path / "test.jsonl").open("a") as stream:
        stream.write("\n")
    assert not any({"sent", "request"} & set(row) for row in open_rows(decision))
    (tmp_path / "test.jsonl").unlink()
    assert not any({"sent", "request"} & set(row) for row in open_rows(decision))


TOOL = {"name": "book", "description": "Book a table.", "parameters": {"type": "object", "properties": {"seats": {"type": "integer"}}}}
HOW = {"ask": "text", "shots": None, "local": False}


def test_what_was_sent_stands_in_parts_and_what_rows_share_stands_once():
    texts, offer = Texts(), f"Tools:\n{json.dumps(TOOL)}\n\nRequest:"
    rows = [Example(toolcall_prompt([TOOL], request), call("book", {}), request, tools=[TOOL]) for request in ("For two.", "For three.")]
    for row in rows:
        ((whom, parts),) = sent("toolcall", row, {"azure": HOW, "slm": HOW}, texts)
        assert whom == "both" and parts == [("System text", 0), ("Tools (1), at the head of the user’s message", 1), ("User", row.id)]
    assert list(texts) == [SYSTEM_PROMPTS["toolcall"], offer]


def test_each_side_has_what_it_was_sent_itself():
    messages = [{"role": "system", "content": "You are Mila."}, {"role": "user", "content": "For\u202e two."}]
    row = Example("", "{}", "a", messages=messages, value={}, schema={"type": "object"}, options={"seed": 1})
    asked = {"azure": HOW | {"ask": "native"}, "slm": HOW | {"ask": "native", "local": True, "shots": 3}}
    texts = Texts()
    (_, hosted), (_, small) = sent("structured", row, asked, texts)
    told = [[(title, part if isinstance(part, str) else list(texts)[part]) for title, part in parts] for parts in (hosted, small)]
    assert told[0] == [("JSON Schema", '{"type": "object"}'), ("Options", '{"seed": 1}'), ("System text", "You are Mila."), ("User", "For\\u202e two.")]
    assert [title for title, _ in told[1]] == ["System text", "Examples", "User"] and told[1][0][1].startswith("You are Mila.\n\nReply with one JSON value")
    assert "Up to 3 rows" in told[1][1][1]
    # Recorded replies: nobody knows what was said, so that no system text is claimed.
    unknown = {side: HOW | {"ask": None} for side in asked}
    prompted = Example("For two.", "{}", "b")
    assert sent("structured", prompted, unknown, texts) == [("row", [("User", "For two.")])]


def test_a_simulated_model_is_called_so(tmp_path):
    def change(decision):
        decision["models"]["azure"]["served_model"] = ["azure-simulator"]

    page = Page(read_decision(make_decision(tmp_path, 4, change=change)))
    assert page.labels["azure"] == "gpt-4o-mini (simulated)" and page.labels["slm"] == "phi-4-mini + adapter_toolcall"
    compared = [what for what, _, _ in page.facts() if "→" in what]
    assert len(compared) == 3 and all("hosted (simulated) → small" in what for what in compared)
    assert page.latency_table().rows[0][0] == "Hosted (simulated), one at a time"
    text = render(tmp_path / "decision.json").read_text()
    assert "the hosted model is the demo’s simulator" in text


POINT = (
    "stage", "track", "verdict", "fine_tune", "rule", "delta", "rows", "models", "code", "created_at", "trace", "failing",
    "schema_version",
)  # fmt: skip


def to_point_rule(decision: dict) -> None:
    """What compare.py wrote before it knew intervals, groups and cost."""
    metrics = {name: {key: values[key] for key in ("azure", "slm", "difference")} for name, values in decision["metrics"].items()}
    reports = {side: {key: decision["reports"][side][key] for key in ("path", "sha256")} for side in ("azure", "slm")}
    kept = {key: decision[key] for key in POINT} | {"metrics": metrics, "reports": reports, "rule": "point"}
    decision.clear()
    decision |= kept


def test_a_decision_of_the_point_rule_shows_what_it_has(tmp_path, draw_once):
    page = render(make_decision(tmp_path, change=to_point_rule)).read_text()
    assert words.HEADLINES[FINE_TUNE] in page and "How good both models are" in page and "How it was measured" in page
    for gone in (
        'id="settle"',
        'id="gap"',
        'id="groups"',
        'id="cost"',
        'id="confidence"',
        'id="before"',
        'id="holds"',
        'id="rows"',
        "<script",
        "None",
        "interval",
    ):
        assert gone not in page, gone


PARTS = (
    "sentence", "need", "matchers", "gap", "groups", "gold_audit", "before", "cost", "sequential", "confidence", "cascade", "warnings", "trace", "labels",
    "models",
    "clusters", "inputs", "alpha", "rows", "code", "created_at", "flips", "failing",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_absent_and_is_null_then(tmp_path, part):
    found = [
        read_decision(make_decision(tmp_path, 2, change=change))
        for change in (lambda decision: decision.pop(part), lambda decision: decision.update({part: None}))
    ]
    assert found[0] == found[1] and found[0][part] is None


@pytest.mark.parametrize("parts", [PARTS[at::4] for at in range(4)])
def test_what_is_null_is_left_out(tmp_path, parts, draw_once):
    page = SVG.sub(
        "", render(make_decision(tmp_path, 8, change=lambda decision: decision.update(dict.fromkeys(parts)))).read_text()
    )
    assert "None" not in page[: page.index('id="data"')]
    for part, place in {
        "need": "settle",
        "gap": "gap",
        "groups": "groups",
        "before": "before",
        "cost": "cost",
        "confidence": "confidence",
        "warnings": "warnings",
    }.items():
        assert (f'id="{place}"' in page) == (part not in parts)


@pytest.mark.parametrize(
    "parts",
    [
        ("azure", "training", "curve", "currency"), ("slm", "machine", "unknown", "assumed"), ("azure", "slm"), ("bills",), ("cheaper",),
        ("traffic", "paid_back_months"), ("looked_up_to", "why"), tuple(make_cost()),
    ],
)
def test_parts_of_the_cost_may_be_null(tmp_path, parts, draw_once):
    change = lambda decision: decision["cost"].update(dict.fromkeys(parts))  # noqa: E731
    page = SVG.sub("", render(make_decision(tmp_path, 8, change=change)).read_text())
    assert 'id="cost"' in page and "None" not in page[: page.index('id="data"')]


@pytest.mark.parametrize(
    ("verdict", "told"),
    [(SWAP, "in steps"), (FINE_TUNE, "Begin with Force the reply's form"), (NEED_MORE_DATA, "about 240 further rows (of about 28 further tools)")],
)
def test_each_verdict_says_what_to_do(tmp_path, verdict, told):
    page = Page(read_decision(make_decision(tmp_path, 8, change=lambda decision: decision.update(verdict=verdict))))
    assert page.headline == words.HEADLINES[verdict] and told in page.next_steps()[0]


def test_numbers_stand_where_they_belong(full):
    """By the decision's own numbers, as a person reads them."""
    decision, page = json.loads(full.with_suffix(".json").read_text()), html.unescape(SVG.sub("", full.read_text()))
    exact = decision["metrics"]["args_exact_rate"]
    gap = words.range_of(exact["difference"], exact["interval"])
    row = (
        '<tr role="row"><th role="rowheader" scope="row">Fully right call</th><td role="cell" data-head="Hosted (90% interval)">'
    )
    told = [words.rate_of(exact[side], exact[f"{side}_interval"]) for side in ("azure", "slm")]
    assert (
        f'{row}{told[0]}</td><td role="cell" data-head="Small (90% interval)">{told[1]}</td>' in page and f">{gap}</td>" in page
    )
    assert "5,413.00 USD → 4,380.25 USD" in page and "1,032.75 USD less a month: 3 machines, 43% utilised" in page
    assert "as in the evaluation: under a limit on latency" in page and "Not counted: people, labels" in page
    assert "in 14 tools, worth 13 independent ones" in page and "That saved 120 calls, worth 0.07 USD" in page


# -- Money -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def priced(tmp_path):
    """A function that gives the page of a decision of some verdict and cost, and what it says of money (without its plot)."""

    def build(verdict: str = SWAP, change=lambda cost: None, **given) -> tuple[Page, str]:
        def priced_so(decision):
            decision.update(verdict=verdict, cost=make_cost(verdict, **given))
            change(decision["cost"])

        page = Page(read_decision(make_decision(tmp_path, 4, change=priced_so)))
        tables = [page.cost.bills_table(), page.cost.parts_table()]
        cells = [cell for table in tables if table for row in table.rows for cell in row]
        facts = [text for fact in page.cost.facts() for text in fact]
        return page, "\n".join([*page.cost.sentences(), *facts, *page.next_steps(), *cells])

    return build


def test_the_tiles_are_the_months_bill_and_what_the_margin_allows(priced):
    page, _ = priced()
    assert page.cost.facts() == [
        ("A month of 10,000,000 tasks: hosted → small", "5,413.00 USD → 4,380.25 USD", "1,032.75 USD less a month: 3 machines, 43% utilised"),
        ("Wrong replies that the margin allows", "up to 200,000 a month", "worth 2,000.00 USD"),
        ("Training is paid back after", "less than 0.1 month", "at this volume"),
    ]
    page, text = priced(tasks_per_month=4_000_000)  # 2 machines, 2,920, against 2,165.20
    assert page.cost.facts()[0][2] == "755.05 USD more a month: 2 machines, 26% utilised" and len(page.cost.facts()) == 2
    assert "saves nothing (755.05 USD more a month)" in page.next_steps()[-1] and "paid back" not in text


@pytest.mark.parametrize("verdict", [FINE_TUNE, NEED_MORE_DATA])
def test_nothing_is_paid_back_without_a_swap(priced, verdict):
    assert "paid back" in priced()[1]
    assert "paid back" not in priced(verdict)[1]
    assert "paid back" not in priced(verdict, lambda cost: cost.update(paid_back_months=0.4))[1]  # whatever the file says


def test_without_a_volume_there_is_a_table_and_where_it_pays(priced):
    page, text = priced(tasks_per_month=None)
    (tile,) = page.cost.facts()
    assert tile[:2] == ("The small model costs less", "from 2,697,673 to 3,864,705, from 5,394,883 to 7,729,411, and from 8,092,094 tasks a month on")
    assert [row[:4] for row in page.cost.bills_table().rows] == [
        ["10,000", "5.41 USD", "1,460.25 USD", "1 machine, 0.13% utilised"],
        ["100,000", "54.13 USD", "1,460.25 USD", "1 machine, 1.3% utilised"],
        ["1,000,000", "541.30 USD", "1,460.25 USD", "1 machine, 13% utilised"],
    ]
    assert "paid back" not in text and "0.189 USD (machine 100% utilised)" in text


@pytest.mark.parametrize("key", ["hour", "hours_per_month", "training_hour", "pay_off_months"])
def test_savings_that_are_unknown_are_called_so(priced, key):
    page, text = priced(local={key: None})
    assert page.cost.facts() == [("Savings", "unknown", "fill in slm_swap/prices.toml")]
    assert "Savings unknown: fill in slm_swap/prices.toml." in text
    assert any(f"{key} in [local] in slm_swap/prices.toml" in unknown for unknown in page.decision["cost"]["unknown"])
    assert page.cost.figure(["a", "b"]) is None and "costs less from" not in text


def test_a_decision_of_an_older_compare_has_no_savings(priced):
    def older(cost):
        kept = {name: cost[name] for name in ("currency", "azure", "slm", "training", "unknown")}
        del kept["slm"]["utilisation"]
        cost.clear()
        cost |= kept | {"on_demand": {"break_even_tasks": 0, "why": None}, "always_on": None}

    page, text = priced(change=older)
    assert page.cost.facts() == [("Savings", "unknown", "compare again")] and "(machine utilisation not known)" in text


@pytest.mark.parametrize(
    "given",
    [
        {}, {"tasks_per_month": None}, {"peak_factor": 40}, {"tasks_per_month": 300_000_000}, {"local": {"hour": 0}}, {"tasks_per_month": 1},
        {"local": {"hour": 0.000001}}, {"local": {"hour": 2.855}},
    ],
)  # fmt: skip
def test_the_cost_plots_caption_agrees_with_its_lines(priced, given, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "cost_steps", lambda curve, shaded, volume, *_: drawn.update(curve=curve, shaded=shaded, volume=volume))
    monkeypatch.setattr(plots, "svgs", lambda draw: {})
    page, _ = priced(**given)
    caption = page.cost.figure(["a", "b"]).caption
    curve, shaded, most = drawn["curve"], drawn["shaded"], drawn["curve"][-1]["tasks"]
    for at in curve:
        inside = any(first <= at["tasks"] <= last for first, last in shaded)
        assert inside == (at["slm"] < at["azure"] * (1 - 1e-12)), at
    if shaded == [(1, most)]:
        assert "cheaper at every volume shown" in caption
    elif shaded:
        assert all(f"{first:,}" in caption for first, _ in shaded[:5]) and "Shaded: the volumes" in caption
    else:
        assert "nowhere cheaper" in caption
    told = re.search("up to ([0-9,]+) here", caption)
    assert (int(told[1].replace(",", "")) if told else 1) == curve[-1]["machines"]
    assert ("dotted line is your volume" in caption) == (drawn["volume"] is not None)


def test_two_hosted_models_have_no_machines(priced):
    def hosted_too(cost):
        for bill in cost["bills"]:
            bill.update(machines=None, utilisation=None, slm_parts={"tokens": 4380.0, "training": 0.25, "fallback": 0.0})
        cost["machine"] = None
        cost["slm"].update(utilisation=None, seconds_per_row=None, hour=None)
        for at in cost["curve"]:
            at["machines"] = None

    page, text = priced(change=hosted_too)
    assert "utilised" not in text and "its own tokens" in text
    assert page.cost.facts()[0][2] == "1,032.75 USD less a month"


def test_two_models_that_miss_nothing(tmp_path):
    page = SVG.sub("", render(make_decision(tmp_path, lines=make_rows(8, misses=(0, 0)))).read_text())
    assert 'id="gap"' in page and "Points of the gap by kind" not in page and "There is no row in which both models agree" in page


def test_findings_are_those_of_the_tests(tmp_path):
    def change(decision):
        metrics = decision["metrics"]
        metrics["valid_call_rate"] |= {"p_value": 0.05}
        metrics["name_match_rate"] |= {"p_value": 0.051}
        metrics["args_f1"] |= {"p_value": None, "interval": [-0.01, 0.02]}
        metrics["args_recall"] |= {"p_value": None, "interval": [-0.01, 0.021]}
        metrics["args_precision"] |= {"p_value": None, "interval": None, "difference": 0.02}

    page = Page(read_decision(make_decision(tmp_path, 8, change=change)))
    assert {name: page.finding(name) for name in TRACK.gate} == {
        "valid_call_rate": "good enough", "name_match_rate": "not settled", "args_exact_rate": "worse than the margin",
        "args_f1": "good enough", "args_recall": "not settled", "args_precision": "good enough",
    }  # fmt: skip
    assert page.level == "90%"


def test_doubts_are_told_beside_the_verdict(tmp_path):
    def change(decision):
        decision["gold_audit"] |= {"count": 3, "verdict_without": SWAP}

    first, second = Page(read_decision(make_decision(tmp_path, 8, change=change))).doubts()
    assert "(lenient)" in first and "3 rows" in second and "“Swap”" in second
    agreed = make_decision(tmp_path, 8, change=lambda decision: decision["matchers"]["lenient"].update(verdict=FINE_TUNE))
    assert Page(read_decision(agreed)).doubts() == []


def test_the_same_decision_gives_the_same_bytes(full, tmp_path):
    again = tmp_path / "again.html"
    again.write_text("".join(write_page(read_decision(full.with_suffix(".json")))))
    assert again.read_bytes() == full.read_bytes()


def test_plots_come_for_both_themes_and_widths(full):
    pictures = SVG.findall(full.read_text())
    assert len(pictures) == 4 * 7 and len(set(pictures)) == 4 * 7  # gap, models, errors, tools, cost, before and after, confidence
    draw = plots.behind(["a $x^2$ <b>", ""], [0.01, -0.02], [None, [-0.05, 0.01]], 0.02, "points")
    found = plots.svgs(draw)
    assert "a $x^2$ &lt;b&gt;" in base64.b64decode(found["wide_light"].address.split(",", 1)[1]).decode()  # a dollar is a dollar
    models = plots.svgs(
        plots.both_models(
            ["a"], [dict.fromkeys(("azure", "slm"), 0.5) | dict.fromkeys(("azure_interval", "slm_interval"))], ["_x", "y"]
        )
    )
    assert (
        "_x" in base64.b64decode(models["wide_light"].address.split(",", 1)[1]).decode()
    )  # matplotlib's own mark for "not in the legend"
    assert found == plots.svgs(draw) and {name: picture.width for name, picture in found.items()} == {
        "wide_light": 720, "wide_dark": 720, "narrow_light": 340, "narrow_dark": 340,
    }  # fmt: skip


# -- The script ------------------------------------------------------------------------------------------------------------------


def test_the_script_writes_beside_the_decision_or_elsewhere(run_script, render_script, tmp_path, draw_once):
    decision = make_decision(tmp_path, 4)
    code, printed, error = run_script(render_script, "--decision", decision)
    assert (code, printed, error) == (0, f"report: {tmp_path / 'decision.html'}\nnext: open {(tmp_path / 'decision.html').as_uri()} in a browser\n", "")
    assert run_script(render_script, "--decision", decision, "--out", tmp_path / "there/page.html")[0] == 0
    assert (tmp_path / "there/page.html").read_bytes() == (tmp_path / "decision.html").read_bytes()


def test_the_script_finds_a_track_s_decision(run_script, render_script, tmp_path, monkeypatch, draw_once):
    (tmp_path / "03_compare/reports").mkdir(parents=True)
    make_decision(tmp_path / "03_compare/reports", 4).rename(tmp_path / "03_compare/reports/toolcall.json")
    monkeypatch.setattr(render_script, "PACKAGE", tmp_path)
    assert run_script(render_script, "--track", "toolcall")[0] == 0 and (tmp_path / "03_compare/reports/toolcall.html").is_file()


def without(path: str):
    *way, last = path.split(".")

    def change(decision):
        for key in way:
            decision = decision[key]
        del decision[last]

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without("stage"), "is not a decision"),
        (without("track"), "is not a decision"),
        (without("verdict"), "is not a decision"),
        (without("metrics"), "is not a decision"),
        (without("metrics.args_f1.slm"), "$.metrics.args_f1"),
        (lambda decision: decision.update(verdict="MAYBE"), "$.verdict"),
        (lambda decision: decision.update(metrics={}), "$.metrics"),
        (lambda decision: decision.update(cost="cheap"), "$.cost"),
        (lambda decision: decision["metrics"]["args_f1"].update(azure=90), "$.metrics.args_f1.azure"),
        (lambda decision: decision["metrics"]["args_f1"].update(azure=float("nan")), "a number in it that is none"),
        (lambda decision: decision["reports"]["slm"].update(rows_path="/nowhere/rows.jsonl"), "no rows at /nowhere/rows.jsonl"),
        (lambda decision: decision["reports"]["slm"].update(rows_path="\0"), "$.reports.slm.rows_path"),
        (lambda decision: decision["reports"]["azure"].update(rows_sha256="0" * 64), "is not the file that was compared"),
    ],
)
def test_what_is_refused(run_script, render_script, tmp_path, change, what):
    code, printed, error = run_script(render_script, "--decision", make_decision(tmp_path, 4, change=change))
    assert code == 2 and printed == "" and error.count("\n") == 1 and what in error, error
    assert not (tmp_path / "decision.html").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"{}", None])
def test_what_is_no_decision(run_script, render_script, tmp_path, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    code, _, error = run_script(render_script, "--decision", path)
    assert code == 2 and error.count("\n") == 1 and "broken.json" in error and "03_compare/compare.py" in error


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_rows_are_paired_by_their_ids_as_compare_does(tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("order")
    examples, azure, slm = make_rows(5)
    decision = make_decision(folder, lines=(examples, azure, slm))
    told = json.loads(decision.read_text())
    in_order = list(open_rows(read_decision(decision)))
    for side, lines, order in (("azure", azure, one), ("slm", slm, other)):
        path = folder / f"{side}.rows.jsonl"
        path.write_text("".join(json.dumps(lines[at]) + "\n" for at in order))
        told["reports"][side]["rows_sha256"] = sha256_file(path)
    decision.write_text(json.dumps(told))
    assert list(open_rows(read_decision(decision))) == [in_order[at] for at in one]


def test_rows_that_are_none_or_of_another_row_are_refused(run_script, render_script, tmp_path):
    examples, azure, slm = make_rows(4)
    for bad in ([*slm[:3], slm[3] | {"reply": None}], [*slm[:2], {"id": 7}, slm[3]], [*slm, slm[0]], [*slm[:3], slm[0]], slm[:3]):
        decision = make_decision(tmp_path, lines=(examples, azure, slm))
        changed = json.loads(decision.read_text())
        rows = tmp_path / "slm.rows.jsonl"
        rows.write_text("".join(json.dumps(line) + "\n" for line in bad))
        changed["reports"]["slm"]["rows_sha256"] = sha256_file(rows)
        decision.write_text(json.dumps(changed))
        with pytest.raises(UserError, match="not the same row"):
            list(open_rows(read_decision(decision)))
    code, _, error = run_script(render_script, "--decision", decision)
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "decision.html").exists()


@pytest.mark.parametrize("name", ["decision.json", "azure.json", "slm.rows.jsonl", "."])
def test_where_the_page_cannot_go(run_script, render_script, tmp_path, name):
    decision = make_decision(tmp_path, 4)
    before = decision.read_bytes()
    code, _, error = run_script(render_script, "--decision", decision, "--out", tmp_path / name)
    assert code == 2 and error.count("\n") == 1 and "--out" in error and decision.read_bytes() == before


@pytest.mark.parametrize("flags", [[], ["--track", "poetry"], ["--track", "toolcall", "--decision", "x.json"]])
def test_usage_errors_are_one_line(run_script, render_script, flags):
    code, _, error = run_script(render_script, *flags)
    assert code == 2 and error.count("\n") == 1 and "--help" in error


# -- The policy ------------------------------------------------------------------------------------------------------------------


def test_the_policy_lets_only_this_script_and_style_run(full):
    page = full.read_text()
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1])
    (style,), scripts = (
        re.findall(r"<style>(.*?)</style>", page, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
    )
    assert policy == (
        f"default-src 'none'; script-src '{csp_hash(scripts[0])}'; style-src '{csp_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    assert len(scripts) == 1 and page.index("Content-Security-Policy") < page.index("<style>")
    assert csp_hash("alert('Hello, world.');") == "sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng="  # the standard's example
    assert not re.search(r"\s(style|on\w+)=", page[: page.index('id="data"')].replace(style, ""))
    assert "innerHTML" not in page and not re.search(r"(src|href)=\"(?!data:|#|https://langfuse.example)", page)


# -- In the browser --------------------------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_everybody_can_read_it(open_page, full, width, theme):
    """axe-core's rules of WCAG 2.0 to 2.2, A and AA, with everything opened; and no sideways scrolling."""
    from axe_playwright_python.sync_playwright import Axe

    page, heard = open_page(full, width, theme)
    page.select_option("#filter-right", "=neither")
    for button in page.locator("#body > tr:not(.detail) button").all()[:3]:
        button.click()
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = page.context.new_cdp_session(page)
    found.send("Page.setBypassCSP", {"enabled": True})  # axe is a script of the test's own
    result = Axe().run(page, options={"runOnly": {"type": "tag", "values": rules}, "resultTypes": ["violations"]})
    assert not result.response["violations"], result.generate_report()
    assert len(result.response["passes"]) > 25
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[theme] and heard == []


@needs_chromium
@pytest.mark.parametrize(("width", "theme"), [(360, "dark"), (1280, "light")])
def test_the_plot_fits_screen_and_theme_and_says_its_numbers(open_page, full, width, theme):
    page, _ = open_page(full, width, theme)
    for image in page.locator("figure img").all():
        shown = image.evaluate("(image) => [image.currentSrc, image.naturalWidth, image.getBoundingClientRect().width]")
        svg = base64.b64decode(shown[0].split(",", 1)[1]).decode()
        assert plots.THEMES[theme].slm in svg and plots.THEMES["dark" if theme == "light" else "light"].slm not in svg
        drawn = plots.WIDTHS["narrow" if width == 360 else "wide"]
        assert (
            shown[1] == round(drawn * 4 / 3) and shown[2] > 0.93 * drawn
        )  # drawn in points; its text is shown as large as drawn
        assert re.search(r"\d", image.get_attribute("alt"))


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_a_hostile_decision_does_nothing_and_is_shown_as_it_is(open_page, hostile, width):
    page, heard = open_page(hostile, width)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    everything = page.evaluate("document.querySelector('main').textContent")
    for text in HOSTILE:
        assert visible(text) in everything, text
    for button in page.locator("#body > tr:not(.detail) button").all():
        button.click()
    for number, text in enumerate(HOSTILE):
        row = page.locator("#body > tr:not(.detail)").nth(number)
        assert row.locator(".id").text_content() == f"{visible(text)} {number}" and row.locator(
            ".group"
        ).text_content() == visible(text)
        blocks = page.locator("#body > tr.detail").nth(number).locator("pre")
        shown = [
            block.evaluate("(pre) => [...pre.childNodes].filter((n) => n.nodeName !== 'DEL').map((n) => n.textContent).join('')")
            for block in blocks.all()
        ]
        assert shown[-3:] == [visible(text), f"{visible(text)} {visible(text)}", visible(text)]
        assert f"Ended by: {visible(text)}" in page.locator("#body > tr.detail").nth(number).text_content()
    assert {f"{visible(text)} (1)" for text in HOSTILE} <= set(page.locator("#filter-group option").all_text_contents())
    assert page.evaluate("window.ran") is None and page.title() == f"{words.HEADLINES[FINE_TUNE]} (toolcall)"
    assert (
        page.locator("script").count() == 2
        and page.locator("iframe, svg, form, base, meta[http-equiv=refresh], [onerror], [onfocus]").count() == 0
    )
    assert (
        page.locator("img[src='x'], a[href^='javascript'], link:not([rel=icon])").count() == 0
        and page.locator("#measured a").count() == 0
    )
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert heard == []


@needs_chromium
def test_what_slipped_in_would_not_run(open_page, full, tmp_path):
    """The policy holds even where escaping failed: the page's own text is changed to hold a script, a handler and an image."""
    page = tmp_path / "slipped.html"
    page.write_text(
        full.read_text().replace(
            "<main>", "<main><script>window.ran=1</script><img src='https://example.com/x.png' onerror='window.ran=2'>"
        )
    )
    opened, heard = open_page(page)
    assert opened.evaluate("window.ran") is None and len([line for line in heard if "Content Security Policy" in line]) >= 2
    assert "failed: csp" in heard and opened.locator("#body tr").count() == 50  # our own script still runs


def shown_ids(page) -> list[str]:
    return page.locator("#body .id").all_text_contents()


@needs_chromium
def test_filters(open_page, full):
    from playwright.sync_api import expect

    page, heard = open_page(full)
    rows = list(open_rows(read_decision(full.with_suffix(".json"))))
    wrong = {
        "azure": [row for row in rows if row["slm"]["right"] < row["azure"]["right"]],
        "slm": [row for row in rows if row["azure"]["right"] < row["slm"]["right"]],
    }
    wrong |= {"neither": [row for row in rows if not row["azure"]["right"] and not row["slm"]["right"]]}
    assert all(wrong.values()) and page.locator("#count").text_content() == "Rows 1 to 50 of 120."
    for who, wanted in wrong.items():
        page.select_option("#filter-right", f"={who}")
        assert shown_ids(page) == [row["id"] for row in wanted]
        assert page.locator("#count").text_content() == f"Rows 1 to {len(wanted)} of {len(wanted)} (120 in all)."
    both = len(rows) - sum(map(len, wrong.values()))
    assert page.locator("#filter-right option").nth(1).text_content() == f"Both right ({both})"
    page.click("#clear")
    for error in MADE:
        wanted = [row["id"] for row in rows if error in (row["azure"]["error"], row["slm"]["error"])]
        if wanted:
            page.select_option("#filter-error", f"={error}")
            assert shown_ids(page) == wanted
    page.click("#clear")
    page.select_option("#filter-group", f"={rows[0]['group']}")
    page.select_option("#filter-right", "=both")
    assert (
        shown_ids(page)
        == [r["id"] for r in rows if r["group"] == rows[0]["group"] and r["azure"]["right"] and r["slm"]["right"]][:50]
    )
    page.click("#clear")
    page.select_option("#filter-mark", "=reference")
    assert shown_ids(page) == ["row-00039", "row-00079", "row-00119"]
    page.click("#clear")
    page.fill("#filter-text", "ROW-0000")
    expect(page.locator("#count")).to_have_text("Rows 1 to 10 of 10 (120 in all).")
    assert shown_ids(page) == [f"row-{number:05}" for number in range(10)]
    page.fill("#filter-text", "nothing has this")
    expect(page.locator("#count")).to_have_text("No row fits these filters (120 in all).")
    assert shown_ids(page) == []
    page.click("#clear")
    assert len(shown_ids(page)) == 50 and heard == []


@needs_chromium
def test_a_row_s_difference_is_marked(open_page, tmp_path, draw_once):
    examples, azure, slm = make_rows(1, misses=(0, 0))
    slm[0] |= {"reply": examples[0].completion.replace('"count":', '"number":'), "error": "missing_argument"}
    slm[0]["scores"] |= {TRACK.exact: 0.0}
    azure[0]["reply"] = examples[0].completion.replace('"count":', '"count": ')
    azure[0]["seconds"], slm[0]["seconds"], slm[0]["load"] = 0.25, 2.5, 8
    page, _ = open_page(render(make_decision(tmp_path, lines=(examples, azure, slm))))
    assert page.locator("#body td").all_text_contents()[:2] == ["✓ right", "✗ missing argument"]
    page.click("#body button")
    system, prompt, reference, left, right = page.locator("#body .detail pre").all()
    assert system.text_content() == SYSTEM_PROMPTS["toolcall"] and not system.is_visible()
    assert (prompt.text_content(), reference.text_content(), left.text_content()) == (
        examples[0].prompt,
        examples[0].completion,
        azure[0]["reply"],
    )
    assert left.locator("ins").all_text_contents() == [" "] and page.locator(".note").all_text_contents() == [
        "User", "tokens: 160 in, 40 out; 250 ms", "Equal as JSON: order of keys and spacing do not count.", "tokens: 160 in, 40 out; 2.5 s, 8 at a time",
    ]
    assert (right.locator("del").all_text_contents(), right.locator("ins").all_text_contents()) == (["count"], ["number"])
    for mark, line in (("del", "line-through"), ("ins", "underline")):
        assert right.locator(mark).evaluate("(mark) => getComputedStyle(mark).textDecorationLine") == line
    page.click("#body button")
    assert page.locator(".detail").count() == 0


@needs_chromium
def test_filter_and_row_stand_in_the_address(open_page, full):
    from playwright.sync_api import expect

    page, heard = open_page(full)
    page.select_option("#filter-right", "=azure")
    page.fill("#filter-text", "=row & 0000")
    expect(page.locator("#count")).to_have_text("No row fits these filters (120 in all).")
    assert parse_qs(urlsplit(page.url).fragment) == {"right": ["azure"], "text": ["=row & 0000"]}
    page.fill("#filter-text", "row")
    expect(page.locator("#count")).to_contain_text("Rows 1 to")
    wanted = shown_ids(page)[2]
    page.locator("#body button").nth(2).click()
    assert parse_qs(urlsplit(page.url).fragment) == {"right": ["azure"], "text": ["row"], "row": [wanted]}
    address, ids = page.url, shown_ids(page)
    other = page.context.new_page()
    other.goto(address)
    assert shown_ids(other) == ids and other.input_value("#filter-text") == "row" and other.input_value("#filter-right") == "=azure"
    assert other.locator("#body > tr.open .id").all_text_contents() == [wanted] and other.locator(".detail").count() == 1
    other.goto(f"{full.as_uri()}#row=row-00117")
    assert other.locator("#body > tr.open .id").all_text_contents() == ["row-00117"] and len(shown_ids(other)) == 20
    other.goto(f"{full.as_uri()}#row=gone")
    assert "gone of the address is not among them" in other.locator("#count").text_content()
    page.click("#clear")
    assert page.url.endswith("#rows") and heard == []


@needs_chromium
def test_the_rows_of_the_filter_are_downloaded_and_a_row_is_copied(open_page, full):
    page, heard = open_page(full, accept_downloads=True, permissions=["clipboard-read", "clipboard-write"])
    page.select_option("#filter-right", "=neither")
    with page.expect_download() as started:
        page.click("#download")
    lines = [json.loads(line) for line in Path(started.value.path()).read_text().splitlines()]
    rows = {row["id"]: row for row in open_rows(read_decision(full.with_suffix(".json")))}
    assert [line["id"] for line in lines] == shown_ids(page)
    for line in lines:
        row = rows[line["id"]]
        assert put_together(row["slm"]["diff"]) == (line["reference"], line["small"]["reply"]) and line["small"]["error"] == row["slm"]["error"]
        assert line["sent"][0]["to"] == "both" and line["sent"][0]["parts"][0]["text"] == SYSTEM_PROMPTS["toolcall"] and line["hosted"]["input_tokens"] == 160
    page.locator("#body button").first.click()
    page.get_by_text("Copy row as JSON").click()
    page.get_by_text("Copied").wait_for()
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == lines[0]
    page.get_by_text("Copy link to this row").click()
    page.get_by_text("Copied").nth(1).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.url and f"row={lines[0]['id']}" in page.url and heard == []


@needs_chromium
def test_paper_has_no_buttons_and_everything_that_is_folded(open_page, full):
    page, _ = open_page(full)
    page.emulate_media(media="print")
    assert page.locator("button:visible, select:visible, input:visible, nav:visible").count() == 0
    for details in page.locator("details").all():
        assert details.evaluate("(own) => own.lastElementChild.getBoundingClientRect().height > 0 && own.lastElementChild.checkVisibility({contentVisibilityAuto: true})")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 1920])
def test_a_wide_screen_is_used(open_page, full, width):
    page, _ = open_page(full, width)
    boxes = [page.locator(place).first.bounding_box() for place in (".verdict-told", ".facts", ".verdict-next")]
    assert boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"] - 1 and boxes[1]["x"] + boxes[1]["width"] > 0.85 * min(width, 1664)
    if width == 1280:
        assert boxes[2]["y"] + boxes[2]["height"] < 800  # what to do next is on the first screen


@needs_chromium
def test_by_keyboard_alone(open_page, full):
    page, heard = open_page(full)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.focus("#filter-right")
    page.keyboard.press("n")  # Neither right
    first = page.locator("#body .id").first.text_content()
    assert "120 in all" in page.locator("#count").text_content()
    for _ in range(8):
        page.keyboard.press("Tab")
    button = "document.activeElement"
    assert page.evaluate(f"{button}.textContent") == f"Show row {first}"
    page.keyboard.press("Enter")
    assert page.evaluate(f"[{button}.textContent, {button}.ariaExpanded]") == [f"Hide row {first}", "true"]
    assert page.evaluate(f"document.getElementById({button}.getAttribute('aria-controls')).className") == "detail"
    page.keyboard.press("Space")
    assert page.evaluate(f"{button}.ariaExpanded") == "false" and page.locator(".detail").count() == 0
    page.focus("#clear")
    page.keyboard.press("Enter")
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.locator("#count").text_content() == "Rows 51 to 100 of 120." and shown_ids(page)[0] == "row-00050"
    page.keyboard.press("Enter")
    assert len(shown_ids(page)) == 20 and page.is_disabled("#next") and page.evaluate("document.activeElement.id") == "previous"
    page.keyboard.press("Enter")
    assert page.locator("#count").text_content() == "Rows 51 to 100 of 120." and heard == []


@needs_chromium
def test_without_javascript_everything_but_the_rows_is_there(open_page, full):
    page, _ = open_page(full, java_script_enabled=False)
    assert "needs JavaScript" in page.locator("noscript").inner_text() and not page.locator("#browser").is_visible()
    assert page.locator("figure img").count() == 7
    summary = page.locator("#quality summary")
    summary.click()
    assert page.get_by_text("Both models on every metric").is_visible()


@needs_chromium
def test_five_thousand_rows_are_there_and_fifty_in_the_document(open_page, tmp_path, draw_once):
    from playwright.sync_api import expect

    page, heard = open_page(render(make_decision(tmp_path, 5000)))
    assert page.evaluate("JSON.parse(document.getElementById('data').textContent).rows.length") == 5000
    assert page.locator("#count").text_content() == "Rows 1 to 50 of 5,000." and page.locator("#body tr").count() == 50
    page.fill("#filter-text", "row-04999")
    expect(page.locator("#count")).to_have_text("Rows 1 to 1 of 1 (5,000 in all).")
    assert shown_ids(page) == ["row-04999"] and heard == []


@needs_chromium
def test_a_page_of_the_point_rule_opens_without_a_script(open_page, tmp_path, draw_once):
    page, heard = open_page(render(make_decision(tmp_path, 4, change=to_point_rule)), 360)
    assert page.locator("h1").text_content() == words.HEADLINES[FINE_TUNE] and page.locator("script").count() == 0 and heard == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
