"""What attention does in a run: how much of it goes to each group of tokens, and at which distance.

Both come from outputs of the op, because attention is linear in the values. Values that indicate a group give the mass
on it; values that hold positions and their squares give the distance to it. No matrix of queries by keys is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastrope as fr
from fastrope.activity import Where
from fastrope.checks import require, require_tensor
from fastrope.extras import importing

from .sequence import JointSequence
from .work import LayerWork, Work, weighing


@dataclass(frozen=True)
class Look:
    """One layer in one call: ``mass`` and ``distance`` by group, see :class:`Record`."""

    call: int
    step: int
    layer: int
    kind: str
    mass: dict[str, float]
    distance: dict[str, float]


@dataclass(eq=False)
class Record:
    """What ``handle.inspect`` measured. A context manager, which stops recording at its end.

    Groups are ``"text"``, ``"target"``, ``"reference 0"`` and so on; the host's padding tokens are in none.

    * ``mass``: the share of attention on the group's keys, mean over queries, heads and batch rows.
    * ``distance``: the distance from the query to those keys, in units of the host's positions (tokens): the root of
      the mean square over queries, heads and batch rows, weighted by attention. Text has no place, so no distance.
    """

    _stop: Callable[[], None]
    _seen: list[tuple] = field(default_factory=list)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop recording."""
        self._stop()

    @property
    def looks(self) -> list[Look]:
        """All measurements, in order of calls and layers. Each branch of guidance is a separate call."""
        found = []
        for call, site, names, sums in sorted(self._seen, key=lambda seen: (seen[0], seen[1].layer)):
            mass = {name: float(m) for name, m in zip(names, sums[0].tolist(), strict=True)}
            distance = {
                name: (square / m) ** 0.5 if m > 0 else float("nan")
                for name, m, square in zip(names, *sums.clamp(min=0).tolist(), strict=True)
                if name != "text"
            }
            found.append(Look(call, site.step, site.layer, site.kind, mass, distance))
        return found

    def mean(self, what: str, by: str) -> dict[str, dict[int, float]]:
        """Mean of ``what`` (``"mass"`` or ``"distance"``) for every ``"layer"`` or ``"step"``, as ``by`` says.

        Returns:
            ``{group: {index: mean}}``.

        Raises:
            ValueError: another ``what`` or ``by``.
        """
        require(what in ("mass", "distance"), "what", '"mass" or "distance"', repr(what))
        require(by in ("layer", "step"), "by", '"layer" or "step"', repr(by))
        values: dict[str, dict[int, list[float]]] = {}
        for look in self.looks:
            for name, value in getattr(look, what).items():
                values.setdefault(name, {}).setdefault(getattr(look, by), []).append(value)
        return {name: {n: sum(v) / len(v) for n, v in sorted(each.items())} for name, each in values.items()}

    def plot(self, path: str | Path) -> None:
        """Draw mass and distance over layers and over steps into a file; needs matplotlib (``fastrope[demo]``).

        Raises:
            ValueError: nothing was recorded.
            ImportError: matplotlib is not installed.
        """
        require(bool(self._seen), "record", "a run of the pipeline while it was open", "none")
        with importing("matplotlib"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        labels = {"mass": "share of attention", "distance": "distance, tokens (RMS)"}
        colours: dict[str, str] = {}
        for row, what in zip(axes, labels, strict=True):
            for axis, by in zip(row, ("layer", "step"), strict=True):
                for name, values in self.mean(what, by).items():
                    colour = colours.setdefault(name, f"C{len(colours)}")
                    axis.plot(list(values), list(values.values()), marker=".", label=name, color=colour)
                axis.grid(alpha=0.3)
            row[0].set_ylabel(labels[what])
        axes[1, 0].set_xlabel("layer")
        axes[1, 1].set_xlabel("step")
        axes[0, 0].legend()
        figure.savefig(path, dpi=150)


class Inspector:
    """Makes the probes of one record.

    Args:
        record: that the probes write to.
        where: layers and steps to inspect.
        queries: a slice, bool mask or index tensor over the sequence; None means the target's tokens.
    """

    def __init__(self, record: Record, where: Where, queries: slice | torch.Tensor | None) -> None:
        self._record = record
        self._where = where
        if queries is not None and not isinstance(queries, slice):
            require_tensor("queries", queries, (1,), "(S,) bool or indices; or a slice")
        self._queries = queries
        self._calls = -1

    def probe(self, site: fr.Site, sequence: JointSequence, plain: Work) -> Callable | None:
        """The function that a layer calls with its queries and keys; None for a layer that is not inspected."""
        if site.layer == 0:
            self._calls += 1
        if site not in self._where:
            return None
        call = self._calls

        def look(q: torch.Tensor, k: torch.Tensor, work: LayerWork | None, applied: bool) -> None:
            with torch.no_grad():
                sums = self._sums(q, k, work or plain, applied, sequence, site)
            self._record._seen.append((call, site, list(groups(site.tokens)), sums))

        return look

    def _sums(
        self, q: torch.Tensor, k: torch.Tensor, work: LayerWork, applied: bool, sequence: JointSequence, site: fr.Site
    ) -> torch.Tensor:
        """``(2, groups)``: means of the mass and of the mass times the squared distance."""
        wide = torch.promote_types(q.dtype, torch.float32)  # half precision cannot hold squared positions
        places = sequence.positions if sequence.positions.ndim == 2 else sequence.positions[0]
        places = places[:, list(site.spatial_axes)].to(q.device, wide)
        places = places - places[site.tokens.target].mean(dim=0)
        values = moments(site.tokens, places)
        found = []
        for some in values.split(q.shape[3], dim=1):
            v = torch.nn.functional.pad(some, (0, q.shape[3] - some.shape[1]))[None, :, None].expand(*k.shape)
            with weighing():
                found.append(work.attend(q.to(wide), k.to(wide), v, applied)[..., : some.shape[1]])
        queries = self._queries if self._queries is not None else site.tokens.target
        queries = queries if isinstance(queries, slice) else queries.to(q.device)
        out = torch.cat(found, dim=-1)[:, queries].unflatten(-1, (-1, 4))  # (B, queries, H, groups, 4)
        at = places[queries]
        mass, first, second = out[..., 0], out[..., 1:3], out[..., 3]
        crossed = torch.einsum("bqhgx,qx->bqhg", first, at)
        square = second - 2 * crossed + at.square().sum(dim=1)[:, None, None] * mass
        return torch.stack([x.mean(dim=(0, 1, 2)) for x in (mass, square)])


def groups(tokens: fr.TokenLayout) -> dict[str, slice]:
    """The spans of a layout by name."""
    references = {f"reference {n}": tokens.reference(n) for n in range(len(tokens.reference_grids))}
    return {"text": tokens.text, "target": tokens.target, **references}


def moments(tokens: fr.TokenLayout, places: torch.Tensor) -> torch.Tensor:
    """``(S, 4 * groups)``: per group, on its keys, 1, both coordinates and their squared length; 0 on other keys.

    Args:
        places: ``(S, 2)``.
    """
    moments = torch.cat([torch.ones_like(places[:, :1]), places, places.square().sum(dim=1, keepdim=True)], dim=1)
    spans = groups(tokens).values()
    values = torch.zeros(len(places), len(spans), 4, dtype=places.dtype, device=places.device)
    for n, span in enumerate(spans):
        values[span, n] = moments[span]
    return values.flatten(1)
