"""Print the README's table of model families: what `test_families.py` verifies.

python -m tests.models.table
"""

from tests.models.families import FAMILIES

TITLES = {  # the functions of columns.py
    "infer": "infer",
    "batches": "batch 8 = batch 1",
    "forward": "= plain forward pass",
    "labels": "labels",
    "packed": "packed = alone",
    "adapter": "adapter",
    "merge": "merged = adapter",
    "resume": "resumed = whole",
}


def table() -> str:
    """The table in Markdown, with the lines of what is refused below it."""
    lines: list[str] = []
    rows = [["family", *TITLES.values()], ["---"] * (1 + len(TITLES))]
    for family in FAMILIES.values():
        cells = []
        for cell in family.cells(TITLES).values():
            kind, _, line = cell.partition(": ")
            if line and line not in lines:
                lines.append(line)
            cells.append(f"{kind} ({lines.index(line) + 1})" if line else kind)
        rows.append([family.name, *cells])
    told = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return told + "".join(f"\n\n({number}) `{line}`" for number, line in enumerate(lines, 1))


if __name__ == "__main__":
    print(table())
