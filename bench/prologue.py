"""The best a careful user writes with torch alone: a compiled prologue, torch's fused kernels, a compiled epilogue.

What folds into keys is folded into keys, in float32 and rounded once: rotation, group means, band weights. A gain is
folded into the query before it is rounded. Queries that no modulation sets apart take one call over all keys. The
others meet the keys in sets: those that are not scaled in one call for all of them, those that are in one call per
distinct scale, whose keys are rotated once more; the parts are merged by their log-sum-exps. Rows of a batch that mask
keys are attended one by one, over the keys that are left.

Keys that a modulation scatters are sorted, so that every set of them is a view. Tables of cosines and index sets are
made before the clock starts, as are the plans of our own contestants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

import fastrope as fr
from fastrope.rope import join_pairs, split_pairs

from .fused_calls import Attend, merge
from .problem import Problem, Unsupported, key_mask

MAX_SCALES = 16  # a call and a copy of the covered keys each
Rows = slice | torch.Tensor


@dataclass(frozen=True, eq=False)
class Turn:
    """Rotation of the tokens ``rows``: ``cos, sin (n, D/2)`` float32."""

    cos: torch.Tensor
    sin: torch.Tensor
    rows: Rows
    pairing: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Those tokens of ``x (B, S, H, D)``, turned: ``(B, n, H, D)`` float32."""
        first, second = split_pairs(x[:, self.rows].float(), self.pairing)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return join_pairs(first * cos - second * sin, second * cos + first * sin, self.pairing)


@dataclass(frozen=True, eq=False)
class Keys:
    """What becomes of the keys that ``turn`` reads: groups of BiasDelta (which of them, as rows and as a mask, lambda,
    delta) and band weights ``(n, D)``."""

    turn: Turn
    groups: tuple[tuple[Rows, torch.Tensor, float, float], ...]
    weight: torch.Tensor | None

    def __call__(self, k: torch.Tensor) -> torch.Tensor:
        """``ktt (B, n, H, D)`` in the dtype of ``k``."""
        x = self.turn(k)
        for rows, members, bias, delta in self.groups:
            mu = x[:, rows].mean(dim=1, keepdim=True)
            x = torch.where(members[:, None, None], (bias - delta) * mu + delta * x, x)
        return (x if self.weight is None else x * self.weight[:, None]).to(k.dtype)


@dataclass(frozen=True, eq=False)
class KeySet:
    """Keys that queries set apart see under one signature: ``rows`` of the keys left, ``places`` of the same among the
    scaled ones (None: they are not scaled), the product of the gains there ``(n,)``."""

    rows: Rows
    places: Rows | None
    gain: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Lowered:
    """A problem, or one row of its batch with the keys ``left`` to it, as calls of a fused kernel."""

    left: Rows
    plain: Turn  # queries that nothing sets apart
    keys: Keys  # all keys left, at r = 1
    apart: Turn | None = None  # the other queries, sorted by scale
    levels: tuple[Turn, ...] = ()  # the same, each at its scale; empty without a QueryScale
    level_keys: tuple[Keys, ...] = ()  # the scaled keys, at each scale
    sizes: tuple[int, ...] = ()  # queries of each level
    sets: tuple[KeySet, ...] = ()
    inverse: torch.Tensor | None = None  # order of the queries once plain and apart are joined


class _Lowering:
    """The host's work: index sets and tables, the latter from float64 angles."""

    def __init__(self, problem: Problem, left: torch.Tensor | None):
        tokens, self.device = problem.k.shape[1], problem.q.device
        self.left = torch.arange(tokens, device=self.device) if left is None else left
        self.rope, self.key_rope = problem.rope, problem.rotation_of_keys

        def of(kind: type) -> list[tuple]:
            some = [m for m in problem.modulations if isinstance(m, kind)]
            return [(m, key_mask(m.keys, tokens, self.device)[self.left]) for m in some]

        # Keys are written anew anyway: in an order that makes each set of them a view, for one gather of the values.
        signature = self._signature(of(fr.QueryScale), of(fr.LogitGain))
        if len(signature.unique_consecutive()) > len(signature.unique()):
            self.left = self.left[signature.argsort(stable=True)]
        self.scales, self.gains = of(fr.QueryScale), of(fr.LogitGain)
        self.groups, self.weights = of(fr.BiasDelta), of(fr.BandWeight)
        if any(x.ndim != 1 for x in (*(m.scale for m, _ in self.scales), *(m.gain for m, _ in self.gains))):
            raise Unsupported("scales and gains per batch row")
        if any(isinstance(x, torch.Tensor) for m, _ in self.groups for x in (m.bias, m.delta)):
            raise Unsupported("lambda and delta per batch row")
        self.r = self.scales[0][0].scale if self.scales else torch.ones(problem.q.shape[1], device=self.device)
        self.scaled = self.scales[0][1] if self.scales else torch.zeros_like(self.left, dtype=torch.bool)
        for _, members in self.groups:
            if bool((members & self.scaled).any()) and bool((members & ~self.scaled).any()):
                raise Unsupported("a group whose keys are scaled in part")

    def lower(self) -> Lowered:
        differs = self.r != 1
        for m, _ in self.gains:
            differs = differs | (m.gain != 1)
        left, keys = _as_slice(self.left), self._keys(torch.arange(len(self.left), device=self.device), None)
        if not bool(differs.any()):
            return Lowered(left, self._turn(self.rope.angles, slice(None)), keys)
        plain, apart = (x.nonzero().flatten() for x in (~differs, differs))
        if not len(plain):
            raise Unsupported("every query is modulated")
        apart = apart[self.r[apart].argsort(stable=True)]
        values, sizes = self.r[apart].unique_consecutive(return_counts=True) if self.scales else ((), ())
        if len(values) > MAX_SCALES:
            raise Unsupported(f"{len(values)} distinct scales, a call and a copy of the keys each")
        sizes = tuple(int(n) for n in sizes)
        parts = apart.split(sizes) if sizes else ()
        scaled = self.scaled.nonzero().flatten()
        return Lowered(
            left, self._turn(self.rope.angles, plain), keys, self._turn(self.rope.angles, apart),
            tuple(self._turn(self._at(self.rope.angles, r), rows) for r, rows in zip(values, parts, strict=True)),
            tuple(self._keys(scaled, r) for r in values), sizes, tuple(self._sets(apart)),
            torch.cat([plain, apart]).argsort(),
        )  # fmt: skip

    def _turn(self, angles: torch.Tensor, rows: Rows) -> Turn:
        some = angles[rows]
        rows = rows if isinstance(rows, slice) else _as_slice(rows)
        return Turn(some.cos().float(), some.sin().float(), rows, self.rope.pairing)

    def _at(self, angles: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """``phi'`` at the scale ``r``."""
        axes = self.scales[0][0].axes
        if axes is None:
            return angles * r.to(angles)
        return torch.where(torch.isin(self.key_rope.axis, torch.tensor(axes, device=self.device)), angles * r, angles)

    def _keys(self, some: torch.Tensor, r: torch.Tensor | None) -> Keys:
        """The keys ``some`` of those left, at the scale ``r`` (None: 1)."""
        angles = self.key_rope.angles if r is None else self._at(self.key_rope.angles, r)
        groups = [(members[some], m.bias, m.delta) for m, members in self.groups if bool(members[some].any())]
        weight = None
        for m, keys in self.weights:
            w = m.weight.repeat_interleave(2) if self.rope.pairing == "interleaved" else torch.cat([m.weight] * 2)
            w = torch.where(keys[some][:, None], w.float(), 1.0)
            weight = w if weight is None else weight * w
        indexed = tuple((_as_slice(x.nonzero().flatten()), x, bias, delta) for x, bias, delta in groups)
        return Keys(self._turn(angles, self.left[some]), indexed, weight)

    def _signature(self, scales: list[tuple], gains: list[tuple]) -> torch.Tensor:
        """What queries set apart do to each key left: a bit for each gain, above them one for the scale."""
        return sum((keys.long() << n for n, (_, keys) in enumerate(gains + scales)), start=torch.zeros_like(self.left))

    def _sets(self, apart: torch.Tensor) -> Iterator[KeySet]:
        signature, place = self._signature(self.scales, self.gains), self.scaled.cumsum(0) - 1
        for value in signature.unique().tolist():
            gains = [m.gain[apart] for n, (m, _) in enumerate(self.gains) if value >> n & 1]
            rows = (signature == value).nonzero().flatten()
            yield KeySet(
                _as_slice(rows), _as_slice(place[rows]) if value >> len(self.gains) else None,
                torch.stack(gains).prod(dim=0).float() if gains else None,
            )  # fmt: skip


def _as_slice(rows: torch.Tensor) -> Rows:
    """A slice where ``rows`` are consecutive: a view of the keys instead of a copy."""
    first, count = int(rows[0]), len(rows)
    consecutive = torch.equal(rows, torch.arange(first, first + count, device=rows.device))
    return slice(first, first + count) if consecutive else rows


class Pieces:
    """``prologue`` makes the arguments of the fused calls, ``epilogue`` the output of what they give. Both are
    functions of tensors alone, so that a compiler takes each as one graph.

    Args:
        stacked: levels as batch rows of one call, values repeated, instead of a call each.
    """

    def __init__(self, lowered: Lowered, stacked: bool):
        self.lowered, self.stacked = lowered, stacked and len(lowered.levels) > 1
        self.starts = tuple(accumulate(lowered.sizes, initial=0))

    def prologue(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """``(q, k, v)`` of each call, ``(B', n, H, D)``; the first is that of the queries nothing sets apart."""
        p, keys, values = self.lowered, self.lowered.keys(k), v[:, self.lowered.left]
        calls = [(p.plain(q).to(q.dtype), keys, values)]
        if p.apart is None:
            return calls
        turned, levels, level_keys = p.apart(q), [x(q) for x in p.levels], [x(k) for x in p.level_keys]
        for some in p.sets:
            part = values[:, some.rows]
            if some.places is None:
                calls.append((_gained(turned, some.gain, q), keys[:, some.rows], part))
                continue
            queries = [_gained(x, self._of_level(some.gain, n), q) for n, x in enumerate(levels)]
            here = [x[:, some.places] for x in level_keys]
            if self.stacked:
                calls.append((_stack(queries), _stack(here), part.repeat_interleave(len(here), dim=0)))
            else:
                calls += [(x, y, part) for x, y in zip(queries, here, strict=True)]
        return calls

    def epilogue(self, outs: list[torch.Tensor], lses: list[torch.Tensor | None]) -> torch.Tensor:
        """``out (B, Sq, H, D)``."""
        p = self.lowered
        if p.apart is None:
            return outs[0]
        parts, rest = [], list(zip(outs[1:], lses[1:], strict=True))
        for some in p.sets:
            one = self.stacked or some.places is None
            taken, rest = rest[: 1 if one else len(p.sizes)], rest[1 if one else len(p.sizes) :]
            if self.stacked and some.places is not None:
                taken = self._unstack(*taken[0])
            parts.append((torch.cat([o for o, _ in taken], dim=1), torch.cat([e for _, e in taken], dim=2)))
        merged = merge([o for o, _ in parts], [e for _, e in parts]).to(outs[0].dtype)
        return torch.cat([outs[0], merged], dim=1)[:, p.inverse]

    def _of_level(self, gain: torch.Tensor | None, n: int) -> torch.Tensor | None:
        return None if gain is None else gain[self.starts[n] : self.starts[n + 1]]

    def _unstack(self, out: torch.Tensor, lse: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sizes = self.lowered.sizes
        outs, lses = (x.unflatten(0, (-1, len(sizes))) for x in (out, lse))
        return [(outs[:, n, :size], lses[:, n, :, :size]) for n, size in enumerate(sizes)]


def _gained(x: torch.Tensor, gain: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return (x if gain is None else x * gain[:, None, None]).to(like.dtype)


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """``(B * L, n, H, D)`` of ``L`` tensors, shorter ones filled up with their last token."""
    longest = max(x.shape[1] for x in parts)
    parts = [torch.cat([x, x[:, -1:].expand(-1, longest - x.shape[1], -1, -1)], dim=1) for x in parts]
    return torch.stack(parts, dim=1).flatten(0, 1)


def lower(problem: Problem) -> list[tuple[slice, Lowered]]:
    """Rows of the batch that are attended together, lowered: all at once without a mask, else one by one.

    Raises:
        Unsupported: more distinct scales than calls are sensible, or what this file does not fold.
    """
    if problem.key_mask is None:
        return [(slice(None), _Lowering(problem, None).lower())]
    rows = [(slice(b, b + 1), row.nonzero().flatten()) for b, row in enumerate(problem.key_mask)]
    return [(row, _Lowering(problem, left).lower()) for row, left in rows]


def _steps(problem: Problem, stacked: bool, wrap: Callable) -> Iterator[tuple[Callable, Callable]]:
    """Prologue and epilogue of the rows of the batch that are attended together."""

    def whole(rows: slice, pieces: Pieces) -> Callable[[], list]:
        return lambda: pieces.prologue(*(x[rows] for x in problem.inputs()))

    for rows, lowered in lower(problem):
        pieces = Pieces(lowered, stacked)
        if stacked and not pieces.stacked:
            raise Unsupported("no levels to stack")
        yield wrap(whole(rows, pieces)), wrap(pieces.epilogue)


def careful(problem: Problem, attend: Attend, stacked: bool, wrap: Callable) -> Callable[[], torch.Tensor]:
    """``run() -> (B, Sq, H, D)``.

    Args:
        attend: one of :mod:`fused_calls`.
        stacked: see :class:`Pieces`.
        wrap: what prologue and epilogue are handed to: a compiler.

    Raises:
        Unsupported: as :func:`lower`; nothing to stack.
    """
    key = careful, stacked, wrap
    if key not in problem.scratch:  # what one kernel's contestant compiled serves the other's
        problem.scratch[key] = list(_steps(problem, stacked, wrap))
    steps = problem.scratch[key]

    def run() -> torch.Tensor:
        done = []
        for prologue, epilogue in steps:
            calls = prologue()
            results = [attend(*call, problem.scale, lse=n > 0) for n, call in enumerate(calls)]
            done.append(epilogue([out for out, _ in results], [lse for _, lse in results]))
        return done[0] if len(done) == 1 else torch.cat(done)

    return run
