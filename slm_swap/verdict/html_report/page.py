"""From a decision to one HTML page that needs nothing else: what it shows is worked out here, how is in the template."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_swap.verdict.html_report import words
from slm_swap.verdict.html_report.decision_file import Rows, open_rows
from slm_swap.verdict.html_report.text import all_visible, embedded_json
from slm_swap.verdict.html_report.view import Page
from slm_swap.verdict.html_report.words import count, percent, points, signed, standing

FOLDER = Path(__file__).parent


def write_page(decision: dict[str, Any]) -> Iterator[str]:
    """The page, piece by piece: see `decision_file.read_decision` for what goes in.

    Raises:
        UserError: the rows files are missing, not those that were compared, or broken.
    """
    rows = open_rows(decision)
    page = Page(all_visible(decision))
    return (
        environment()
        .get_template("template.html.j2")
        .generate(
            page=page,
            decision=page.decision,
            words=words,
            rows=rows and rows_json(rows),
            prompts=bool(rows and rows.dataset),
            **assets(),
        )
    )


def environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "count": count, "percent": percent, "points": points, "signed": signed, "standing": standing, "duration": words.duration,
    }  # fmt: skip
    return made


def assets() -> dict[str, Any]:
    """Style and script, and the policy that lets the page run just these two, by their hashes."""
    from markupsafe import Markup

    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{csp_hash(script)}'; style-src '{csp_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}


def csp_hash(text: str) -> str:
    """The source expression of an inline script or style (Content Security Policy Level 3, 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def rows_json(rows: Rows) -> Iterator[Any]:
    """`{"rows": [...], "texts": [...]}`: the rows, one by one, and the texts that they share, safe inside a script element."""
    from markupsafe import Markup

    yield Markup('{"rows":[')
    for number, row in enumerate(rows):
        yield Markup((",\n" if number else "\n") + embedded_json(row))
    yield Markup('],"texts":' + embedded_json(list(rows.texts)) + "}")
