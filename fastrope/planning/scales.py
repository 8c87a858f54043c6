"""Queries under a QueryScale: scales that many share become buckets, and queries are sorted by them.

Pure functions on CPU tensors. They know nothing of backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.abi import QUERY_TILE
from .resolved import Scale
from .tables import ScaleTables, SortedQueries

MAX_BUCKETS = 8  # key copies a plan may ask for: bounds memory at MAX_BUCKETS times the covered keys
MIN_BUCKET_QUERIES = QUERY_TILE  # with more distinct scales than MAX_BUCKETS, a value that a whole tile shares is one
LEAST_UNMODULATED = 0.5  # of the queries; with less a second kernel over them is predicted not to pay
AT_ONE, PER_QUERY = 0, -1  # bucket of a query at r = 1, and of one whose scale has no key copy


def find_buckets(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct scales that get a key copy, ``(n,)``, and the bucket of every query, shaped like ``r``.

    Bucket ``AT_ONE`` is r = 1; bucket n >= 1 is ``buckets[n - 1]``; ``PER_QUERY`` queries keep their exact scale.
    Up to ``MAX_BUCKETS`` distinct values, each is a bucket, however few queries share it. Beyond that only values
    shared by at least ``MIN_BUCKET_QUERIES`` queries are, the most frequent first.
    """
    bucket = torch.full(r.shape, PER_QUERY, dtype=torch.int64, device="cpu")
    bucket[r == 1] = AT_ONE
    values, counts = torch.unique(r[r != 1], return_counts=True)
    if len(values) > MAX_BUCKETS:
        by_count = torch.argsort(counts, descending=True, stable=True)[:MAX_BUCKETS]
        values = values[by_count[counts[by_count] >= MIN_BUCKET_QUERIES].sort().values]
    for n, value in enumerate(values):
        bucket[r == value] = n + 1
    return values, bucket


def scale_tables(scale: Scale, buckets: torch.Tensor, bucket: torch.Tensor) -> ScaleTables:
    """Tables of a QueryScale whose buckets :func:`find_buckets` found."""
    numbers = range(PER_QUERY, len(buckets) + 1)
    counts = tuple(tuple(int((row == n).sum()) for n in numbers) for row in bucket)
    order = bucket.argsort(dim=1, stable=True)
    return ScaleTables(scale.r, scale.pairs, buckets, order, counts, int(scale.keys.sum()))


def sort_queries(bucket: torch.Tensor, r: torch.Tensor, unmodulated: torch.Tensor | None = None) -> SortedQueries:
    """Queries by bucket, so that no tile holds two, and within a bucket by scale.

    Args:
        bucket, r: ``(Bs, Sq)``.
        unmodulated: ``(Sq,)`` bool, queries at r = 1 to be put last, in tiles of their own.
    """
    last = int(bucket.max()) + 1
    kind = torch.where(bucket == AT_ONE, last, bucket)
    if unmodulated is not None:
        kind = torch.where(unmodulated, last + 1, kind)
    rows, row_buckets, num_per_query, num_modulated = [], [], 0, 0
    for row, scale in zip(kind, r, strict=True):
        queries, buckets = [], []
        for value in row.unique().tolist():
            index = (row == value).nonzero().flatten()
            index = index[scale[index].argsort(stable=True)]
            queries.append(torch.nn.functional.pad(index, (0, -len(index) % QUERY_TILE), value=-1))
            buckets += [value if value < last else AT_ONE] * (len(queries[-1]) // QUERY_TILE)
            if value == PER_QUERY:
                num_per_query = max(num_per_query, len(queries[-1]))
            if value <= last:
                num_modulated = max(num_modulated, len(buckets) * QUERY_TILE)
        rows.append(torch.cat(queries))
        row_buckets.append(torch.tensor(buckets, dtype=torch.int64, device="cpu"))
    pad = torch.nn.utils.rnn.pad_sequence
    queries, tile_bucket = pad(rows, True, -1).int(), pad(row_buckets, True, AT_ONE).int()
    return SortedQueries(queries, tile_bucket, num_per_query, num_modulated)


def unmodulated_queries(neutral: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Queries ``(Sq,)`` bool at which all of ``neutral (B or 1, Sq)`` bool hold, if they are most; else None."""
    if not neutral:
        return None
    alone = torch.stack([x.all(dim=0) for x in neutral]).all(dim=0)
    return alone if alone.sum() >= LEAST_UNMODULATED * len(alone) else None
