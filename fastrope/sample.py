"""Small calls that run the same kernels as a given one, to compare these kernels with the reference."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .backends import reference
from .kernels.streams import Projected, Streams
from .modulations import BandWeight, BiasDelta, KeyBias, LogitBias, LogitGain, Modulation, QueryScale, ValueGain
from .planning import Plan, plan
from .rope import RoPE
from .tolerance import Errors, measure

TEXT, GRID = 33, 12  # tokens of text; the target and the reference have GRID x GRID tokens each
TOKENS = TEXT + 2 * GRID**2
EVERY = 5  # every fifth query is compared
MODULATED = 80  # queries: fewer than half, and enough to fill a tile
PASSES = 5  # band weights that no single launch holds


class Kind(NamedTuple):
    """What distinguishes the kernels of calls: how they are compiled, and which of them run.

    Args:
        route: of :data:`fastrope.rules.ROUTES`.
        features: of the plan, see :attr:`fastrope.planning.Lowered.features`.
        per_query: how per-query scales are computed, "polynomial" or "axis blocks"; "" without any.
        descriptors: the loop reads through tensor descriptors.
        passes: there is more than one pass over the keys.
        streams: tokens arrive in parts that were projected apart.
        grouped: queries have more heads than keys.
    """

    route: str
    features: tuple[str, ...]
    per_query: str
    descriptors: bool
    passes: bool
    streams: bool
    grouped: bool
    pairing: str
    dtype: torch.dtype
    dim: int

    def __str__(self) -> str:
        flags = [name for name in ("descriptors", "passes", "streams", "grouped") if getattr(self, name)]
        parts = [*self.features, self.per_query, *flags, self.pairing, str(self.dtype).removeprefix("torch.")]
        return f"{self.route}: {', '.join(filter(None, parts))}, head dim {self.dim}"


class Sample(NamedTuple):
    """``q (B, S, H, D)``, ``k, v (B, S, Hkv, D)`` and their plan."""

    q: Projected
    k: Projected
    v: Projected
    plan: Plan


def draw(kind: Kind, device: torch.device) -> Sample:
    """A call of a kind, the same on every device."""
    generator = torch.Generator().manual_seed(0)  # of its own, on the CPU: the same numbers for every device
    batch, heads = 2 if "mask" in kind.features else 1, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, kind.dtype)

    key_heads = 1 if kind.grouped else heads
    q, k, v = (normal(batch, TOKENS, n, kind.dim) for n in (heads, key_heads, key_heads))
    found = _plan(kind, batch, device)
    if not kind.streams:
        return Sample(q, k, v, found)
    weights = tuple((1 + 0.2 * normal(kind.dim)).contiguous() for _ in range(4))
    queries, keys = (
        Streams((x[:, :TEXT], x[:, TEXT:]), pair, (1e-6, 1e-6)) for x, pair in ((q, weights[:2]), (k, weights[2:]))
    )
    # Axis blocks read queries as they are.
    return Sample(
        queries.joined() if kind.per_query == "axis blocks" else queries, keys, Streams((v[:, :TEXT], v[:, TEXT:])),
        found,
    )  # fmt: skip


def disagreement(sample: Sample, out: Tensor, lse: Tensor | None) -> str | None:
    """How ``out (B, S, H, D)`` and ``lse (B, H, S)`` break the tolerance rule; None if they keep it."""
    resolved, scale = sample.plan.resolved, out.shape[3] ** -0.5
    rows = torch.arange(0, TOKENS, EVERY, device=out.device)
    exact, low = (
        reference.run(q, k, v, resolved, scale, return_lse=True, queries=rows)
        for q, k, v in (
            (_joined(x, dtype) for x in (sample.q, sample.k, sample.v)) for dtype in (torch.float64, out.dtype)
        )
    )
    found = [measure(out[:, rows], exact[0], low[0])]
    if lse is not None:
        found.append(measure(lse[:, :, rows], cast(Tensor, exact[1]), cast(Tensor, low[1]), out.dtype))
    return next((str(errors) for errors in found if not _passed(errors, out.dtype)), None)


def _passed(errors: Errors, dtype: torch.dtype) -> bool:
    """Whether errors keep the rule. In float32 only the largest error counts: on a GPU, correct kernels exceed the
    bound of the mean error, and so does torch's attention (docs/limits.md)."""
    return errors.max_out <= errors.max_allowed if dtype == torch.float32 else errors.passed


def _joined(x: Projected, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Streams):
        return Streams(tuple(part.to(dtype) for part in x.parts), x.weights, x.eps).joined()
    return x.to(dtype)


def _plan(kind: Kind, batch: int, device: torch.device) -> Plan:
    index = torch.arange(TOKENS - TEXT, device="cpu")
    place = index % GRID**2
    image = torch.stack((index // GRID**2, place // GRID, place % GRID), dim=1)
    positions = torch.cat((torch.zeros(TEXT, 3, dtype=image.dtype, device="cpu"), image))
    side = kind.dim // 8 * 2
    rope = RoPE.axial(positions.to(device), (kind.dim - 2 * side, side, side), pairing=kind.pairing)
    mask = None
    if "mask" in kind.features:
        mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
        mask[1, TEXT // 2 : TEXT] = False
    turned = {"rotation": rope, "applied": rope.as_applied()}
    found = next((turned[name] for name in turned if name in kind.features), None)
    return plan(rope=found, modulations=_modulations(kind, device), key_mask=mask, num_keys=TOKENS)


def _modulations(kind: Kind, device: torch.device) -> list[Modulation]:
    covered = slice(TEXT + GRID**2, None)
    # Scales near enough for one tile of the polynomial, or too far apart for it, or two scale buckets.
    ends = {"polynomial": (0.7, 0.72), "axis blocks": (0.3, 0.95), "": (0.65, 0.8)}[kind.per_query]
    ramp = torch.linspace(0, 1, MODULATED, device="cpu")
    r, gain = torch.ones(2, TOKENS, device="cpu")
    r[:MODULATED] = ends[0] + (ends[1] - ends[0]) * (ramp if kind.per_query else ramp.round())
    gain[:MODULATED] = 0.8 + 0.5 * ramp
    bias = torch.linspace(-0.5, 0.5, TOKENS, device="cpu")
    bands = torch.linspace(0.5, 1.2, kind.dim // 2, device="cpu")
    spans = [slice(n, n + 7) for n in range(0, 7 * PASSES, 7)] if kind.passes else [covered]
    modulations = {
        "QueryScale": [QueryScale(r.to(device), keys=covered)],
        "BandWeight": [BandWeight((bands + n / 10).to(device), keys=keys) for n, keys in enumerate(spans)],
        "BiasDelta": [BiasDelta(1.05, 1.1, keys=covered)],
        "LogitGain": [LogitGain(gain.to(device), keys=covered)],
        "LogitBias": [LogitBias(gain.log().to(device), keys=covered)],
        "KeyBias": [KeyBias(bias.to(device))],
        "ValueGain": [ValueGain(0.7, keys=covered)],
        "BiasDelta on values": [BiasDelta(1.05, 1.1, keys=covered, on="values")],
    }
    wanted = {*kind.features, *(("BandWeight",) if kind.passes else ())}
    return [m for name, each in modulations.items() if name in wanted for m in each]
