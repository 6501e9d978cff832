"""Near-duplicates among texts, and the groups of rows that must stay on one side of a split."""

import re
from typing import Any

from slm_swap.dataset.row import Row

NEAR = (7, 10)  # near-duplicates: token Jaccard of at least 7/10, in whole numbers so that no rounding decides

def near_duplicates(texts: list[str]) -> list[int]:
    """A label for each text: equal for texts that a chain of near-duplicates connects, different for all others.

    Near-duplicates are texts whose sets of lower-cased words (`\\w+`) have a Jaccard index of at least 0.7,
    |A n B| >= 0.7 |A u B|, that is 17 |A n B| >= 7 (|A| + |B|). Exact: all pairs that are not too different in size are
    compared, block by block, as a matrix product of whole numbers that float32 holds exactly. Words that many texts have go
    through a dense product, the others through a sparse one, so the time depends little on how much the texts have in common.
    """
    import numpy as np
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    near, whole = NEAR
    block, dense_from, dense_most = 512, 50, 2048  # rows at a time; a word in 1/50 of the texts is cheaper in the dense product
    tokens = [tuple(sorted(set(re.findall(r"\w+", text.lower())))) for text in texts]
    index = {words: at for at, words in enumerate(sorted(set(tokens), key=lambda words: (len(words), words)))}
    vocabulary: dict[str, int] = {}
    columns = np.array([vocabulary.setdefault(word, len(vocabulary)) for words in index for word in words], dtype=np.int64)
    sizes = np.array([len(words) for words in index], dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    sets = sparse.csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(index), len(vocabulary) + 1))
    counts = np.bincount(columns, minlength=sets.shape[1])
    common = min(int((counts > len(index) / dense_from).sum()), dense_most)
    sets = sets[:, np.argsort(-counts, kind="stable")]
    dense, rare = np.column_stack([sets[:, :common].toarray(), sizes]), sets[:, common:].tocsr()
    labels = np.arange(len(index))
    for start in range(0, len(index), block):
        rows = slice(start, start + block)
        others = slice(start, np.searchsorted(near * sizes, whole * sizes[rows][-1], side="right"))
        left = np.column_stack([(near + whole) * dense[rows, :-1], np.full(len(dense[rows]), -near, np.float32)])
        excess = left @ dense[others].T  # 17 |A n B| - 7 |B|, so far over the common words
        shared = (rare[rows] @ rare[others].T).tocoo()
        excess[shared.row, shared.col] += (near + whole) * shared.data
        pairs = (excess >= near * sizes[rows, None]) & (labels[rows, None] != labels[others])
        ends = tuple(labels[side + start] for side in np.nonzero(pairs))
        links = sparse.coo_matrix((np.ones(len(ends[0]), bool), ends), shape=(len(index), len(index)))
        labels = connected_components(links, directed=False)[1][labels]
    return [int(labels[index[words]]) for words in tokens]


def components(rows: list[Row]) -> list[list[Row]]:
    """Rows that must not be torn apart: connected by a near-duplicate, the same query (but for case and white space), the same
    source row or the same group (conversation). In the order of their first rows.
    """
    parent = list(range(len(rows)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    first: dict[tuple[str, Any], int] = {}
    for at, (row, label) in enumerate(zip(rows, near_duplicates([row.request for row in rows]), strict=True)):
        keys = [("near", label), ("query", " ".join(row.request.casefold().split())), ("source", row.source)]
        for key in [*keys, ("group", row.group)] if row.group is not None else keys:
            parent[root(at)] = root(first.setdefault(key, at))
    found: dict[int, list[Row]] = {}
    for at, row in enumerate(rows):
        found.setdefault(root(at), []).append(row)
    return list(found.values())
