"""Near-duplicates among texts, and the groups of rows that must stay on one side of a split."""

import json
import re
from typing import Any

from slm_swap.common.exact_json import EXACT
from slm_swap.dataset.row import Row
from slm_swap.rows.lines import dump_json
from slm_swap.rows.words import NEAR, words

SHARED = 3  # words that near-duplicates share in their prefixes: two different sets of fewer words are never that near
FEW_WORDS = 4  # a request of fewer words ("yes, please") says nothing of its conversation
BLOCK = 512  # texts at a time
FEW_PAIRS = (15, 400_000_000)  # products of words that the prefixes may cost, a 15th of all pairs twice or so many: more is dearer


def near_duplicates(texts: list[str]) -> list[int]:
    """A label for each text: equal for texts that a chain of near-duplicates connects, different for all others.

    Near-duplicates are those of `words.near`. Exact, by one of two ways. Where words are spread well, only pairs that
    share SHARED words among the rarest of each are compared (`_by_prefixes`). Where many texts are alike, all pairs that are not too
    different in size are (`_by_all`).
    """
    tokens = [words(text) for text in texts]
    index = {one: at for at, one in enumerate(sorted(set(tokens), key=lambda one: (len(one), one)))}
    sets, sizes = _as_matrix(list(index))
    labels = _labels(sets, sizes)
    return [int(labels[index[one]]) for one in tokens]


def _as_matrix(index: list[tuple]) -> tuple[Any, Any]:
    """(a row of ones for each set of words, the columns by how many sets have the word, most first; how many words each has)."""
    import numpy as np
    from scipy import sparse

    vocabulary: dict[str, int] = {}
    columns = np.array([vocabulary.setdefault(word, len(vocabulary)) for words in index for word in words], dtype=np.int64)
    sizes = np.array([len(words) for words in index], dtype=np.float32)
    counts = np.bincount(columns, minlength=len(vocabulary) + 1)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    sets = sparse.csr_matrix((np.ones(len(columns), np.float32), rank[columns], offsets), shape=(len(index), len(counts)))
    sets.sort_indices()
    return sets, sizes


def _labels(sets: Any, sizes: Any) -> Any:
    import numpy as np

    prefixes = _prefixes(sets, sizes)
    often = np.bincount(prefixes.indices, minlength=prefixes.shape[1]).astype(np.float64)
    few = min(sets.shape[0] ** 2 / FEW_PAIRS[0], FEW_PAIRS[1])
    return _by_prefixes(sets, sizes, prefixes) if (often**2).sum() / 2 <= few else _by_all(sets, sizes)


def _prefixes(sets: Any, sizes: Any) -> Any:
    """The rarest words of each set, as many as are needed: near-duplicates share at least ceil(0.7 |A|) words of A, and so at least
    SHARED of its |A| - ceil(0.7 |A|) + SHARED rarest (Chaudhuri et al. 2006; the order of the words is the same for all sets)."""
    import numpy as np
    from scipy import sparse

    near, whole = NEAR
    whole_sizes = sizes.astype(np.int64)
    wanted = np.minimum(whole_sizes + (-near * whole_sizes) // whole + SHARED, whole_sizes)  # -7n // 10 is -ceil(0.7 n)
    places = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], whole_sizes)
    kept = places >= np.repeat(whole_sizes - wanted, whole_sizes)  # columns go from common words to rare ones
    offsets = np.concatenate([[0], np.cumsum(wanted)])
    return sparse.csr_matrix((np.ones(int(kept.sum()), np.float32), sets.indices[kept], offsets), shape=sets.shape)


def _by_prefixes(sets: Any, sizes: Any, prefixes: Any) -> Any:
    import numpy as np

    near, whole = NEAR
    labels = np.arange(sets.shape[0])
    turned = prefixes.T.tocsr()
    for start in range(0, sets.shape[0], 8 * BLOCK):
        pairs = (prefixes[start : start + 8 * BLOCK] @ turned).tocoo()
        left, right = pairs.row + start, pairs.col
        likely = (pairs.data >= SHARED) & (right < left) & (near * sizes[left] <= whole * sizes[right])
        left, right = left[likely], right[likely]
        different = labels[left] != labels[right]
        left, right = left[different], right[different]
        for at in range(0, len(left), 200_000):
            one, two = left[at : at + 200_000], right[at : at + 200_000]
            shared = np.asarray(sets[one].multiply(sets[two]).sum(axis=1)).ravel()
            found = (near + whole) * shared >= near * (sizes[one] + sizes[two])
            labels = _joined(labels, one[found], two[found])
    return labels


def _by_all(sets: Any, sizes: Any) -> Any:
    """Block by block, as a matrix product of whole numbers that float32 holds exactly. Words that many texts have go through a dense
    product, the others through a sparse one, so the time depends little on how much the texts have in common.
    """
    import numpy as np

    near, whole = NEAR
    dense_from, dense_most = 50, 2048  # a word in 1/50 of the texts is cheaper in the dense product
    counts = np.bincount(sets.indices, minlength=sets.shape[1])
    common = min(int((counts > sets.shape[0] / dense_from).sum()), dense_most)
    dense, rare = np.column_stack([sets[:, :common].toarray(), sizes]), sets[:, common:].tocsr()
    labels = np.arange(sets.shape[0])
    for start in range(0, sets.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        others = slice(start, np.searchsorted(near * sizes, whole * sizes[rows][-1], side="right"))
        left = np.column_stack([(near + whole) * dense[rows, :-1], np.full(len(dense[rows]), -near, np.float32)])
        excess = left @ dense[others].T  # 17 |A n B| - 7 |B|, so far over the common words
        shared = (rare[rows] @ rare[others].T).tocoo()
        excess[shared.row, shared.col] += (near + whole) * shared.data
        pairs = (excess >= near * sizes[rows, None]) & (labels[rows, None] != labels[others])
        labels = _joined(labels, *(side + start for side in np.nonzero(pairs)))
    return labels


def _joined(labels: Any, one: Any, two: Any) -> Any:
    """The labels with those of each pair made equal."""
    import numpy as np
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    if not len(one):
        return labels
    links = sparse.coo_matrix((np.ones(len(one), bool), (labels[one], labels[two])), shape=(len(labels), len(labels)))
    return connected_components(links, directed=False)[1][labels]


def components(rows: list[Row]) -> list[list[Row]]:
    """Rows that must not be torn apart: connected by a near-duplicate, the same query (apart from case and white space), the same
    source row, the same group (conversation) or the same opening of a conversation. In the order of their first rows.

    Of a team's conversations, near-duplicates hang together only where their replies are equal: what one narrow task is asked differs
    by little ("Where is order 17?"), and a request of its own kind with another reply gives nothing away.
    """
    parent = list(range(len(rows)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    first: dict[tuple[str, Any], int] = {}
    for at, (row, label) in enumerate(zip(rows, near_duplicates([row.request for row in rows]), strict=True)):
        keys = [("near", label, _reply(row)), ("query", " ".join(row.request.casefold().split())), ("source", row.source)]
        keys += [("group", row.group)] if row.group is not None else []
        keys += [("opening", opening)] if (opening := _opening(row)) is not None else []
        for key in keys:
            parent[root(at)] = root(first.setdefault(key, at))
    found: dict[int, list[Row]] = {}
    for at, row in enumerate(rows):
        found.setdefault(root(at), []).append(row)
    return list(found.values())


def _reply(row: Row) -> str | None:
    """A conversation's reply; None for rows of other sources."""
    if row.record is None:
        return None
    calls = sorted(dump_json([call["name"], call["arguments"]]) for call in row.gold)
    return "\n".join(calls) or row.record.get("content") or dump_json(row.record.get("object"))


def _opening(row: Row) -> int | None:
    """What is equal for the replies of one conversation, although each was logged alone: the first request and its reply.

    None for a request of a few words, with which many conversations begin.
    """
    if row.record is None:
        return None
    messages = row.record["messages"]
    replied = next((at for at, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    asked = "\n".join(message["content"] for message in messages[:replied] if message["role"] == "user")
    if len(re.findall(r"\w+", asked)) < FEW_WORDS:
        return None
    if replied == len(messages):
        calls = [(call["name"], dump_json(call["arguments"])) for call in row.gold]
        text = row.record.get("content") or ("" if calls else dump_json(row.record.get("object")))
    else:
        functions = [call["function"] for call in messages[replied].get("tool_calls") or ()]
        calls = [(function["name"], _compact(function["arguments"])) for function in functions]
        text = "" if calls else messages[replied].get("content")
        text = _compact(text) if "calls" not in row.record else text
    return hash((asked, text, *sorted(calls)))


def _compact(text: str) -> str:
    """JSON as `dump_json` writes it; other texts as they are."""
    try:
        return dump_json(json.loads(text, **EXACT))
    except (ValueError, RecursionError):
        return text
