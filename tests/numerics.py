"""The random calls that tests make, held against the one tolerance rule (``fastrope.tolerance``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import fastrope as fr
from fastrope import device as devices
from fastrope.tolerance import MEAN_FACTOR, Errors, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_close(
    out: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, dtype: torch.dtype | None = None, name: str = "out"
) -> Errors:
    """Require that ``out`` is about as good as the reference in its dtype: :func:`fastrope.tolerance.measure`."""
    infinite = exact.isinf()
    assert torch.equal(out[infinite].double(), exact[infinite]), f"{name}: infinities differ"
    assert bool(out[~infinite].isfinite().all()), f"{name}: not finite"
    found = measure(out, exact, low, dtype)
    print(f"{name}: {found}")
    assert found.passed, f"{name}: {found}"
    return found


@dataclass
class Tally:
    """Mean errors pooled over calls, where chance averages out and the plain 1.1 holds."""

    out: float = 0.0
    low: float = 0.0
    calls: int = 0
    floor: float = 0.0
    worst: float = 0.0

    def add(self, errors: Errors, dtype: torch.dtype) -> None:
        self.out, self.low, self.calls = self.out + errors.mean_out, self.low + errors.mean_low, self.calls + 1
        self.worst = max(self.worst, errors.max_out / errors.max_allowed if errors.max_allowed else 0.0)

        if dtype == torch.float32:  # the floor of the rule, for values around 1
            self.floor += torch.finfo(dtype).eps / 4

    def check(self, name: str) -> None:
        if not self.low:
            return
        print(
            f"{name}: {self.calls} calls, pooled mean error {self.out / self.low:.3f} times the reference's, "
            f"worst max error {self.worst:.2f} of what is allowed"
        )
        assert self.out <= MEAN_FACTOR * self.low + self.floor, f"{name}: {self}"


def skip_unless_runnable(backend: str | None) -> None:
    """A triton test is skipped only where triton cannot run at all; under the interpreter it always can."""
    reason = devices.kernel_obstacle(torch.empty(1, device=DEVICE)) if backend == "triton" else None
    if reason:
        assert not devices.interpreted(), reason
        pytest.skip(reason)


def with_tiles(monkeypatch, kernel: str, **fields: object) -> None:
    """Replace fields of a kernel's launch configuration."""
    from fastrope.kernels import config

    select = config._SELECTORS[kernel]
    monkeypatch.setitem(config._SELECTORS, kernel, lambda *where: replace(select(*where), **fields))


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of :func:`fastrope.attention`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rope: fr.RoPE | None = None
    key_rope: fr.RoPE | None = None
    modulations: Sequence[object] = ()
    key_mask: torch.Tensor | None = None
    scale: float | None = None
    label: str = ""

    def __repr__(self) -> str:
        names = ", ".join(type(m).__name__ for m in self.modulations)
        return f"Call({self.label or 'plain'}: q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, [{names}])"

    def _repr_pretty_(self, printer, cycle) -> None:  # hypothesis would print every element
        printer.text(repr(self))

    def tokens(self) -> dict:
        """What a plan is made of."""
        return {name: getattr(self, name) for name in ("rope", "key_rope", "modulations", "key_mask")}

    def run(self, backend: str, return_lse: bool = True, **changes):
        """``(out, lse)``, or ``out`` alone."""
        arguments = {**self.tokens(), "scale": self.scale, "return_lse": return_lse, "backend": backend, **changes}
        return fr.attention(self.q, self.k, self.v, **arguments)

    def planned(self) -> fr.Plan:
        return fr.plan(**self.tokens(), num_queries=self.q.shape[1], num_keys=self.k.shape[1], device=self.q.device)

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in another dtype. Strides and what lies around the tensors are not kept."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference in float64."""
        return self.to(torch.float64).run("eager")

    def low(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference in the dtype of the call."""
        return self.run("eager")


def check(call: Call, backend: str, tally: Tally | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a call on a backend and hold output and log-sum-exp against the rule."""
    out, lse = call.run(backend)
    compare(call, out, lse, f"{backend} {call.label}", tally)
    return out, lse


def compare(
    call: Call, out: torch.Tensor, lse: torch.Tensor, name: str = "", tally: Tally | None = None,
    twin: Call | None = None,
) -> None:  # fmt: skip
    """Hold a result against the reference of ``call``; how exact it can be, the low dtype's run of ``twin`` says, where
    that is the call which gave the result."""
    batch, queries, heads, _ = call.q.shape
    dtype = call.q.dtype
    assert out.shape == call.q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.shape == (batch, heads, queries)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    exact, low = call.exact(), (twin or call).low() if dtype != torch.float64 else (out, lse)
    errors = assert_close(out, exact[0], low[0], name=f"{name} {dtype} out")
    assert_close(lse, exact[1], low[1], dtype, name=f"{name} {dtype} lse")
    if tally is not None:
        tally.add(errors, dtype)


# ---- builders --------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "heads_first", "fused", "padded", "transposed", "expanded")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers, rounded to ``dtype``."""
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``x (B, S, H, D)`` with other strides; whatever lies between and behind its elements is NaN.

    ``heads_first`` (B, H, S, D) memory; ``fused`` a third of a fused QKV projection; ``padded`` the middle of longer
    buffers in every dimension; ``transposed`` channels not contiguous; ``expanded`` one batch row, stride 0.
    """
    if layout == "contiguous":
        return x
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    batch, length, heads, dim = x.shape
    if layout == "fused":
        buffer = x.new_full((batch, length, 3, heads, dim), torch.nan)
        view = buffer[:, :, 1]
    else:
        buffer = x.new_full((batch, length + 5, heads + 1, dim + 8), torch.nan)
        view = buffer[:, 2 : length + 2, :heads, 8:]
    view.copy_(x)
    return view


def tensors(
    g: torch.Generator,
    *,
    batch: int = 1,
    queries: int = 64,
    keys: int | None = None,
    heads: int = 2,
    key_heads: int | None = None,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q, k, v``."""
    keys, key_heads = keys or queries, key_heads or heads
    q = draw(g, batch, queries, heads, dim, dtype=dtype)
    k, v = (draw(g, batch, keys, key_heads, dim, dtype=dtype) for _ in range(2))
    return lay_out(q, layout), lay_out(k, layout), lay_out(v, layout)


def grid(tokens: int, text: int = 0, frame: int = 0, width: int | None = None) -> torch.Tensor:
    """Positions ``(tokens, 3)``: text at the origin, then rows of a picture (the last one may be short)."""
    width = width or max(1, math.isqrt(max(tokens - text, 1)))
    index = torch.arange(tokens - text)
    picture = torch.stack([torch.full_like(index, frame), index // width, index % width], dim=1)
    return torch.cat([torch.zeros(text, 3, dtype=torch.int64), picture]).to(DEVICE)


def scatter(g: torch.Generator, tokens: int, extent: float = 60.0, batch: int | None = None) -> torch.Tensor:
    """Positions without structure, ``(tokens, 3)`` or ``(batch, tokens, 3)`` float64."""
    shape = (tokens, 3) if batch is None else (batch, tokens, 3)
    return (torch.rand(*shape, generator=g, dtype=torch.float64) * extent).to(DEVICE)


def axes_of(dim: int) -> tuple[int, int, int]:
    """Channels of a frame axis and two spatial axes, in the proportions of FLUX."""
    spatial = dim * 7 // 16 // 2 * 2
    return dim - 2 * spatial, spatial, spatial


def axial(positions: torch.Tensor, dim: int, pairing: str = "interleaved", applied: bool = False) -> fr.RoPE:
    return fr.RoPE.axial(positions, axes_of(dim), pairing=pairing, applied=applied)


def uniform(g: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return (low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)).to(DEVICE)


LEVELS = (0.6503, 0.6603, 0.8250, 0.9897, 0.9997)  # of the authors' code of LooseRoPE
SCALES = ("levels", "few", "distinct", "mixed", "zero")


def scales(g: torch.Generator, kind: str, queries: int, batch: int | None = None) -> torch.Tensor:
    """``r (queries,)`` or ``(batch, queries)``.

    ``levels`` five values and 1; ``few`` at most eight queries, each its own value, the others 1; ``distinct`` every
    query its own; ``mixed`` two thirds share a value (a level from 128 queries on), others their own; ``zero``;
    ``two`` a level and 1, the fewest that tell buckets apart.
    """
    shape = (batch or 1, queries)
    own = uniform(g, *shape, high=1.2)
    if kind == "levels":
        table = torch.tensor((*LEVELS, 1.0), dtype=torch.float64, device=DEVICE)
        r = table[torch.randint(len(table), shape, generator=g).to(DEVICE)]
    elif kind == "few":
        r = torch.ones_like(own)
        each = max(1, 8 // shape[0])
        r[:, :each] = own[:, :each]
    elif kind == "mixed":
        shared = torch.rand(*shape, generator=g).to(DEVICE) < 0.67
        r = torch.where(shared, 0.75, own)
    elif kind == "zero":
        r = torch.zeros_like(own)
    elif kind == "two":
        r = torch.where(torch.rand(*shape, generator=g).to(DEVICE) < 0.5, LEVELS[0], 1.0).to(own)
    else:
        r = own
    return r if batch else r[0]


KEY_SETS = ("all", "slice", "negative", "step", "mask", "indices", "one")


def key_set(g: torch.Generator, kind: str, keys: int) -> slice | torch.Tensor:
    """A non-empty key set in one of the forms a user may write."""
    a, b = sorted(torch.randint(keys, (2,), generator=g).tolist())
    if kind == "slice":
        return slice(a, b + 1)
    if kind == "negative":
        return slice(a - keys, None)
    if kind == "step":
        return slice(a % 3 % keys, None, 2)
    if kind == "one":
        return slice(a, a + 1)
    if kind in ("mask", "indices"):
        mask = torch.rand(keys, generator=g) < 0.5
        mask[a] = True
        if kind == "mask":
            return mask.to(DEVICE)
        index = mask.nonzero().flatten()
        index = torch.cat([index[torch.randperm(len(index), generator=g)], index[:1]])  # unsorted, one twice
        return index.to(DEVICE)
    return slice(None)


def members(keys: slice | torch.Tensor, num_keys: int) -> torch.Tensor:
    """A key set as a ``(num_keys,)`` bool mask on the CPU."""
    covered = torch.zeros(num_keys, dtype=torch.bool)
    covered[keys if isinstance(keys, slice) else keys.cpu()] = True
    return covered


def disjoint_sets(g: torch.Generator, count: int, keys: int) -> list[torch.Tensor]:
    """``count`` masks that share no key and leave some out; fewer where there are too few keys."""
    owner = torch.randint(count + 1, (keys,), generator=g)
    owner[torch.randint(keys, (1,), generator=g)] = 0
    return [(owner == n).to(DEVICE) for n in range(count) if bool((owner == n).any())]


def every_modulation(
    g: torch.Generator, queries: int, keys: int, dim: int, kind: str = "levels", batch: int | None = None
) -> list:
    """All four at once on different key sets, the group only partly under the QueryScale."""
    third, most = keys // 3, max(1, 2 * (keys // 3))
    rows = () if batch is None else (batch,)
    return [
        fr.QueryScale(scales(g, kind, queries, batch), keys=slice(third, None), axes=(1, 2)),
        fr.BandWeight(uniform(g, dim // 2, low=0.25, high=1.4), keys=slice(0, most)),
        fr.BandWeight(uniform(g, dim // 2, low=0.5, high=1.2), keys=key_set(g, "mask", keys)),
        fr.BiasDelta(1.1, 0.8, keys=slice(third // 2, most)),
        fr.LogitGain(uniform(g, *rows, queries, low=-0.5, high=1.4), keys=slice(third, None)),
    ]  # fmt: skip


def some_biases(
    g: torch.Generator, *shape: int, low: float = -2.0, high: float = 2.0, hidden: float = 0.2
) -> torch.Tensor:
    """Logit or key biases, a part of them ``-inf``."""
    b = uniform(g, *shape, low=low, high=high)
    return b.masked_fill((torch.rand(*shape, generator=g) < hidden).to(DEVICE), -torch.inf)


def biases_and_values(g: torch.Generator, queries: int, keys: int, batch: int = 1) -> list:
    """All that biases logits and changes values, on different key sets."""
    third, most = keys // 3, max(1, 2 * (keys // 3))
    own = torch.where(torch.arange(keys) % 3 == 0, -1.5, 0.7).to(DEVICE, torch.float64)
    return [
        fr.LogitBias(some_biases(g, batch, queries), keys=slice(third, None)),
        fr.LogitBias(-0.7, keys=key_set(g, "slice", keys)),
        fr.KeyBias(some_biases(g, keys)),
        fr.ValueGain(own[: most - third // 2], keys=slice(third // 2, most)),
        fr.ValueGain(0.5, keys=slice(0, most)),
        fr.BiasDelta(1.3, 0.6, keys=slice(third, most) if most > third else slice(None), on="values"),
    ]


def many_signatures(g: torch.Generator, queries: int, keys: int, dim: int, kind: str | None) -> list:
    """More query variants, groups and products of gains than a launch holds: nearly every key has another signature."""
    modulations = [
        fr.LogitGain(uniform(g, queries, low=0.5, high=1.5), keys=key_set(g, "mask", keys)) for _ in range(4)
    ]
    modulations += [
        fr.BandWeight(uniform(g, dim // 2, low=0.5, high=1.5), keys=key_set(g, "mask", keys)) for _ in range(3)
    ]
    modulations += [
        fr.BiasDelta(1.1, 0.8, keys=torch.tensor([n, (n + keys // 2) % keys])) for n in range(0, keys // 2, 2)
    ]
    if kind is not None:
        modulations.append(fr.QueryScale(scales(g, kind, queries), keys=slice(keys // 4, None)))
    return modulations


def key_masks(g: torch.Generator, kind: str | None, batch: int, keys: int) -> torch.Tensor | None:
    """``random`` about three quarters of the keys; ``row`` also one batch row without any key; ``shared`` one row."""
    if kind is None:
        return None
    mask = torch.rand(1 if kind == "shared" else batch, keys, generator=g) < 0.75
    mask[:, 0] |= ~mask.any(dim=1)
    if kind == "row":
        mask[-1] = False
    return mask.to(DEVICE)
