"""Texts as sets of words, and which of them are near-duplicates."""

import re

NEAR = (7, 10)  # near-duplicates: token Jaccard of at least 7/10, in whole numbers so that no rounding decides


def words(text: str) -> tuple[str, ...]:
    """A text's lower-cased words (`\\w+`), each once, sorted."""
    return tuple(sorted(set(re.findall(r"\w+", text.lower()))))


def near(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the `words` of two texts have a Jaccard index of at least 0.7: |A n B| >= 0.7 |A u B|, that is 17 |A n B| >= 7 (|A| + |B|)."""
    part, whole = NEAR
    return (part + whole) * len(set(one) & set(other)) >= part * (len(one) + len(other))
