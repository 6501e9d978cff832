"""A decision as text: what the tables hold, how wide they are, and that names from outside do nothing."""

import re
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from slm_swap.clients.pricing import HostedPrices, LocalPrices, Prices, Traffic
from slm_swap.scoring.tracks import TRACKS
from slm_swap.scoring.words import ERROR_KINDS, metric_name
from slm_swap.verdict.comparison import examine, examine_means
from slm_swap.verdict.evaluations import read_evaluation
from slm_swap.verdict.gap import measured_gain
from slm_swap.verdict.judge import Gate
from slm_swap.verdict.sentence import points
from slm_swap.verdict.text_report import _confidence, _escape, brief, markdown, notes, plain, table, tables
from tests.support.evaluated import AZURE, REPLIES, SLM, TUNED, calls, replies, write_report

TRACK = TRACKS["toolcall"]
HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07", "one\ntwo\r\tthree\x00\x08", "\u202egnp.exe\u2066", "zero\u200bwidth\u2028\u2029line", "\ud800",
    "@octocat #12 octo/repo#7 GH-3", "https://evil.example www.evil.example a@evil.example", "[a](javascript:x) ![b](http://evil/x.png)",
    "<img src=x onerror=alert(1)> <!-- c --> &lt;b&gt;", "| a | b |\n|---|---|", "**bold** _it_ `code` ~~gone~~ $x^2$ \\| \\", "# title", "[red]rich[/red]",
)  # fmt: skip
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")  # but for the line's end
PRICES = Prices("prices.toml", "USD", {"gpt-4o-mini": HostedPrices(1.0, 0.5, 2.0)}, LocalPrices(0.36, 730, 0.36, 12))
# a task: 0.00012 hosted; a quarter second of the small model's machine, which is 262.80 a month and does 10,512,000 tasks
BUSY = Prices("prices.toml", "USD", PRICES.hosted, PRICES.local, Traffic(5_000_000, 1, 0.01))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A function that gives a whole decision, as compare.py tells it."""

    def build(count=240, azure=("right",) * 7 + ("wrong_value",), slm=("right",) * 10 + tuple(REPLIES), tools=("book", "hire"), rule="paired", delta=0.02, prices=PRICES, names=()):
        folder, examples = tmp_path_factory.mktemp("decision"), calls(count, tools=tools)
        given = {"azure": (azure, AZURE), "slm": (slm, TUNED), "before": (("right", "no_json", "wrong_value"), SLM)}
        sides = {
            name: read_evaluation(write_report(folder / f"{name}.json", examples, replies(examples, errors), model), TRACK, True)
            for name, (errors, model) in given.items()
        }
        for side, name in zip(sides.values(), names, strict=False):
            side.report["model"] |= {"deployment": name}
        found = examine_means(TRACK, sides, delta) if rule == "point" else examine(TRACK, sides, Gate(rule, delta, 0.05), prices)
        labels = {name: side.label for name, side in sides.items()}
        return {"track": "toolcall", "rows": count, "labels": labels} | found | {"warnings": found["warnings"] + ["a warning"]}

    return build


@pytest.fixture(scope="module")
def told(make):
    return make()


def test_the_table_of_confidence():
    own = {"auroc": 0.8125, "interval": [0.7, 0.9], "rows": 40, "missing": 2}
    title, headings, rows = _confidence({"min_logprob": own, "parses": own | {"auroc": None, "interval": None}})
    assert "AUROC" in title and len(headings) == 5
    assert rows == [("Least sure token", "0.812", "0.700 to 0.900", "40", "2"), ("Parses", "", "", "40", "2")]


def printed(told, capsys, monkeypatch, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    table(told)
    return capsys.readouterr().out


def test_the_brief_has_every_metric_and_the_sentence(told, capsys):
    brief(told)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[1 : 1 + len(TRACK.gate)]] == list(map(metric_name, TRACK.gate)) and lines[-1] == told["sentence"]
    exact = next(line for line in lines if line.startswith("Fully right call"))
    own = told["metrics"]["args_exact_rate"]
    assert exact[24:].split()[:3] == [f"{own['azure']:.4f}", f"{own['slm']:.4f}", f"{own['difference']:+.4f}"]
    assert "{:+.4f} to {:+.4f}".format(*own["interval"]) in exact and exact.endswith("worse by more than 0.02")
    assert "90% interval" in lines[0]


def test_the_brief_leads_with_the_months_bill_and_not_with_a_price_at_full_load(make, capsys):
    brief(make(prices=BUSY))
    money = capsys.readouterr().out.splitlines()[-2]
    assert money == (
        "At 5,000,000 tasks a month the hosted model costs 600.00 USD and the small one 262.83 USD (1 machine, 48% utilised): "
        "337.17 USD less a month."
    )
    brief(make(count=40, prices=Prices("prices.toml")))
    assert "Savings unknown: fill in prices.toml." in capsys.readouterr().out.splitlines()


def test_the_brief_by_the_point_rule(make, capsys):
    brief(make(rule="point"))
    shown = capsys.readouterr().out
    assert "interval" not in shown and "worse by more than 0.02" in shown and "By the means of 240 rows alone" in shown


def test_every_table_holds_its_numbers(told):
    found = {title.split(",")[0].split(":")[0].split(" (")[0]: rows for title, _, rows in tables(told)}
    assert list(found) == [
        "240 rows", "Verdict by matcher", "Where the gap in “Fully right call” comes from", "What would close it", "By tool", "Doubtful references",
        "How well confidence tells right small replies from wrong ones", "Before", "What a month costs",
    ]  # fmt: skip
    own = told["metrics"]["args_f1"]
    assert found["240 rows"][-1] == [
        "Argument F1", points(own["azure"]), points(own["slm"]), points(own["difference"]),
        f"{points(own['interval'][0])} to {points(own['interval'][1])}", f"{own['p_value']:.4f}", f"{own['p_worse_holm']:.4f}",
    ]  # fmt: skip
    assert [row[:2] for row in found["Verdict by matcher"]] == [(name, told["verdict"]) for name in ("Strict", "By schema", "Lenient")]
    gap = found["Where the gap in “Fully right call” comes from"]
    assert gap[-1] == ("all", "", "", points(told["gap"]["difference"])) and {row[0] for row in gap[:-1]} == {
        ERROR_KINDS[own["kind"]] for own in told["gap"]["errors"] if own["azure_rows"] or own["slm_rows"]
    }
    assert sum(int(row[2]) for row in gap[:-1]) == round(240 * (1 - told["gap"]["slm"]))
    assert {row[0] for row in found["By tool"]} == {"book", "hire"}
    assert found["Doubtful references"][0][0] == told["gold_audit"]["rows"][0]["id"] and "Bergen" in found["Doubtful references"][0][2]
    assert found["What a month costs"] == [
        ("10,000", "1.20", "262.83", "1", "0.095%", "26.28"), ("100,000", "12.00", "262.83", "1", "0.95%", "2.63"),
        ("1,000,000", "120.00", "262.83", "1", "9.5%", "0.263"),
    ]  # fmt: skip
    gain = told["before"]["metrics"]["args_exact_rate"]
    assert found["Before"][2][:4] == ("Fully right call", points(gain["before"]), points(gain["slm"]), points(gain["gain"]))


def test_the_worst_ten_groups(make):
    title, headings, rows = next(own for own in tables(make(tools=[f"tool_{n}" for n in range(30)])) if own[0].startswith("By tool"))
    assert "the worst 10 of 30" in title and len(rows) == 10 and headings[4] == "shrunk"
    shrunk = [float(row[4]) for row in rows]
    assert shrunk == sorted(shrunk, reverse=True)


def test_no_key_of_json_is_shown(told, make, capsys, monkeypatch):
    """One vocabulary: the page, the console and Markdown say the same names."""
    brief(told)
    shown = capsys.readouterr().out + printed(told, capsys, monkeypatch) + markdown(told)
    assert not set(TRACK.gate) & set(re.findall(r"\w+", shown.replace("\\", ""))) and "azure - slm" not in shown


def test_what_a_remedy_would_have_gained_is_said_in_words(make):
    rows = {row[0]: row[3] for title, _, rows in tables(make(slm=("right",) * 7 + ("wrong_value",))) if title.startswith("What would") for row in rows}
    assert rows["fine-tuning"] == "none of these rows"
    own = {"rows": 4, "gain_measured": 0.0}
    assert measured_gain(own, points) == "too few rows to tell" and measured_gain(own | {"gain_measured": None}, points) == "not measured"
    assert measured_gain(own | {"gain_measured": 0.021}, points) == "2.1"


def test_a_flip_stands_in_the_title_and_among_the_notes(make):
    told = make(slm=("right", "right", "folded"))
    assert "Verdict by matcher: it flips" in [title for title, _, _ in tables(told)]
    assert any("depends on how replies are compared" in note for note in notes(told))


def test_notes(told, make):
    shown = "\n".join(notes(told))
    assert told["sentence"] in shown and "Warning: a warning" in shown
    audit, before = told["gold_audit"], told["before"]
    assert f"not with the reference: {audit['count']}; the verdict without them: {audit['verdict_without']}." in shown
    assert f"were wrong before: {len(before['better'])}. Right before and wrong now: {len(before['worse'])} ({before['worse'][0]}, " in shown
    assert "1,000 tasks as in the evaluation: hosted 0.12 USD, small 0.025 USD (machine 100% utilised)." in shown
    assert "What a month costs, hosted and small: 1.20 USD and 262.83 USD (1 machine, 0.095% utilised) at 10,000 tasks; " in shown
    assert "The small model costs less from 2,190,251 tasks a month on." in shown  # (262.80 + 0.36 / 12) / 0.00012 is 2,190,250
    assert "Assumed: a machine does 4 tasks a second, as in the evaluation" in shown
    unknown = "\n".join(notes(make(count=40, prices=Prices("prices.toml"))))
    assert "1,000 tasks" not in unknown and 'Not known: price of deployment gpt-4o-mini: [hosted."gpt-4o-mini"] in prices.toml.' in unknown


def test_a_need_and_its_cost(make):
    told = make(count=60, slm=["right"] * 7 + ["wrong_value"] * 2, delta=0.05)
    assert told["verdict"] == "NEED_MORE_DATA"
    rows, cost = told["need"]["rows"], told["need"]["azure_cost"]
    assert f"replies to {rows:,} further rows would cost about {cost:.2f} USD." in "\n".join(notes(told))


def test_a_sequential_decision(make):
    told = make(rule="sequential")
    assert f"the verdict was certain after {told['sequential']['certain_after_rows']} rows" in "\n".join(notes(told))
    told["sequential"] |= {"stopped_after_rows": 240, "rows_available": 1000, "calls_saved": 760, "azure_cost_saved": 0.5}
    assert "Stopped after 240 of 1000 rows: 760 calls saved, 0.50 USD." in notes(told)
    told["sequential"] |= {"stopped_after_rows": None, "certain_after_rows": None}
    assert "no verdict is certain yet" in "\n".join(notes(told))


@pytest.mark.parametrize("rule", ["paired", "sequential", "point"])
def test_the_tables_fit_a_terminal_of_80_columns(make, rule, capsys, monkeypatch):
    told = make(tools=[f"a group of a rather long name, number {n}" for n in range(30)], rule=rule, names=["n" * 90] * 2)
    shown = printed(told, capsys, monkeypatch)
    assert max(map(len, shown.splitlines())) <= 80
    assert all(metric_name(name) in shown for name in TRACK.gate)  # no name is folded
    text = " ".join(shown.split())
    assert told["sentence"] in text


def spoilt(told, hostile):
    """The decision with a hostile text wherever a text comes from outside."""
    told = deepcopy(told)
    told["labels"], told["warnings"], told["cost"]["unknown"] = dict.fromkeys(told["labels"], hostile), [hostile], [hostile]
    told["groups"]["all"][0]["group"] = hostile
    told["gold_audit"]["rows"] = [{"id": hostile, "group": None, "reference": hostile, "reply": hostile}]
    told["before"]["worse"] = [hostile] * 3
    return told


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_do_nothing_in_a_terminal(told, hostile, capsys, monkeypatch):
    shown = printed(spoilt(told, hostile), capsys, monkeypatch)
    assert not ACTING.search(shown)
    assert max(map(len, shown.splitlines())) <= 80
    if hostile.startswith("[red]"):
        assert hostile in shown


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_do_nothing_in_markdown(told, hostile):
    text = markdown(spoilt(told, hostile))
    assert not ACTING.search(text)
    check_inert(text, titles=len(tables(told)))


def check_inert(text: str, titles: int) -> None:
    """Rendered, the text is one heading, paragraphs, bold titles and tables of even rows; nothing that GitHub links by itself."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    blocks = [token.type for token in tokens]
    assert {kind.removesuffix("_open").removesuffix("_close") for kind in blocks} <= {
        "heading", "paragraph", "inline", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert blocks.count("heading_open") == 1 and blocks.count("table_open") == titles
    inside = [child.type for token in tokens for child in token.children or []]
    assert set(inside) <= {"text", "text_special", "strong_open", "strong_close", "softbreak"} and inside.count("strong_open") == titles
    shown = "".join(child.content for token in tokens for child in token.children or [])
    assert not re.search(r"[@#][\w]|https?://|www\.|GH-\d", shown, re.IGNORECASE)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_stays_itself_in_markdown(text):
    shown = plain(text, 200)
    (_, inline, _) = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse("x" + _escape(shown) + "x")
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children).replace("\u200b", "") == "x" + shown + "x"


@given(st.text(max_size=200), st.integers(1, 100))
def test_plain_is_one_line_of_at_most_so_many_characters(text, length):
    shown = plain(text, length)
    assert len(shown) <= length and len(shown.splitlines()) <= 1 and not ACTING.search(shown)
    assert plain(shown, length) == shown


def test_plain_cuts_and_keeps_letters():
    assert plain("Zürich 東京", 80) == "Zürich 東京" and plain("abcdef", 4) == "abc…" and plain(None) == "None"
    assert plain("a\x1b[1m\u2028b\u2029c\u202ed\n") == "a�[1m�b�c�d�"


def test_rows_that_got_worse_are_ten_at_most_and_cut(told):
    told = deepcopy(told)
    told["before"]["worse"] = ["x" * 100] * 12
    assert f"wrong now: 12 ({', '.join(['x' * 39 + '…'] * 10)}, …)." in "\n".join(notes(told))


def test_markdown_by_the_point_rule(make):
    text = markdown(make(rule="point"))
    assert text.startswith("## toolcall: FINE_TUNE\n\nBy the means of 240 rows alone")
    check_inert(text, titles=1)
    assert "| metric | hosted | small | hosted - small |\n| --- | --: | --: | --: |\n| Well-formed call |" in text
