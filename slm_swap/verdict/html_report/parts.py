"""What the page is made of besides words."""

from typing import NamedTuple

from slm_swap.verdict.html_report import plots


class Figure(NamedTuple):
    """A plot, what it says to those who do not see it, and what stands below it."""

    pictures: dict[str, plots.Picture]
    alt: str
    caption: str


class Table(NamedTuple):
    """A table whose first column names the rows."""

    caption: str
    head: list[str]
    rows: list[list[str]]
