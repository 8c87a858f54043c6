"""Random calls: any composition of modulations. Structure comes from hypothesis, values from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    KEY_SETS,
    LAYOUTS,
    SCALES,
    Call,
    axial,
    disjoint_sets,
    draw,
    generator,
    grid,
    key_masks,
    key_set,
    members,
    scales,
    scatter,
    some_biases,
    tensors,
    uniform,
)

import fastrope as fr

TOKENS = (1, 2, 5, 16, 17, 33, 64, 100, 113, 130, 200)


@st.composite
def calls(
    draw,
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[int] = TOKENS,
    dims: Sequence[int] = (16, 64, 80, 96, 128),
    heads: Sequence[tuple[int, int]] = ((1, 1), (2, 1), (1, 3), (2, 3)),
) -> Call:
    """Calls with any composition of modulations; values come from a seed, structure from hypothesis.

    Args:
        heads: key heads, and queries' heads that share each.
    """

    def pick(*options):
        return draw(st.sampled_from(options))

    g = generator(draw(st.integers(0, 2**16)))
    batch = pick(1, 1, 2, 3)
    dim = pick(*dims)
    key_heads, share = pick(*heads)
    queries = pick(*tokens)
    positions = pick("grid", "grid", "scatter", "line", "per row", "angles", None)
    crossed = draw(st.booleans())
    keys = pick(*tokens) if crossed else queries
    layout = pick(*LAYOUTS)
    q, k, v = tensors(
        g, batch=batch, queries=queries, keys=keys, heads=key_heads * share, key_heads=key_heads, dim=dim,
        dtype=dtype, layout=layout,
    )  # fmt: skip
    rope = key_rope = None
    if positions is not None:
        pairing = pick("interleaved", "half")
        rope = _rope(g, positions, queries, dim, batch, pairing, draw(st.booleans()))
        if crossed:
            key_rope = _rope(g, positions, keys, dim, batch, pairing, draw(st.booleans()))
    modulations = []
    if rope is not None and draw(st.booleans()):
        axes = pick(None, (1, 2), (2,), (0,)) if positions != "angles" else None
        per_row = batch if draw(st.booleans()) else None
        r = scales(g, pick(*SCALES), queries, per_row)
        modulations.append(fr.QueryScale(r, keys=key_set(g, pick(*KEY_SETS), keys), axes=axes))
    for _ in range(pick(0, 0, 1, 2) if rope is not None else 0):
        weight = uniform(g, dim // 2, low=0.25, high=1.5)
        modulations.append(fr.BandWeight(weight, keys=key_set(g, pick(*KEY_SETS), keys)))
    groups = [(m, "keys") for m in (disjoint_sets(g, pick(1, 2), keys) if draw(st.booleans()) else ())]
    groups += [(m, "values") for m in (disjoint_sets(g, pick(1, 2), keys) if draw(st.booleans()) else ())]
    for group, on in groups:
        bias, delta = 0.5 + uniform(g, batch), 0.5 + uniform(g, batch)
        form = pick("numbers", "scalars", "per row")
        if form != "per row":
            bias, delta = bias[0], delta[0]
        if form == "numbers":
            bias, delta = float(bias), float(delta)
        modulations.append(fr.BiasDelta(bias, delta, keys=group, on=on))
    for _ in range(pick(0, 0, 1, 2)):
        shape = pick((queries,), (batch, queries))
        gain = uniform(g, *shape, low=-1.0, high=1.5)
        modulations.append(fr.LogitGain(gain, keys=key_set(g, pick(*KEY_SETS), keys)))
    modulations += _biases_and_values(g, pick, batch, queries, keys)
    return Call(
        q, k, v, rope, key_rope, draw(st.permutations(modulations)), key_masks(g, pick(None, None, "random", "row",
        "shared"), batch, keys), pick(None, 0.05), label=f"{positions} {layout}",
    )  # fmt: skip


def _biases_and_values(g, pick, batch: int, queries: int, keys: int) -> list:
    found = []
    for _ in range(pick(0, 0, 1, 2)):
        shape = pick((), (queries,), (batch, queries), (batch, 1))
        bias = some_biases(g, *shape, hidden=pick(0.0, 0.3)) if shape else pick(-0.7, 1.5, -torch.inf)
        found.append(fr.LogitBias(bias, keys=key_set(g, pick(*KEY_SETS), keys)))
    for _ in range(pick(0, 0, 1, 2)):
        found.append(fr.KeyBias(some_biases(g, *pick((keys,), (batch, keys)), hidden=pick(0.0, 0.3))))
    for _ in range(pick(0, 0, 1, 2)):
        covered = key_set(g, pick("all", "slice", "step", "mask", "one"), keys)
        count = int(members(covered, keys).sum())
        shape = pick((), (count,), (batch, count), (batch, 1))
        found.append(fr.ValueGain(uniform(g, *shape, low=-1.5, high=1.5) if shape else pick(-1.0, 0.0, 2.0), covered))
    return found


def _rope(g, positions: str, tokens: int, dim: int, batch: int, pairing: str, applied: bool) -> fr.RoPE:
    if positions == "angles":
        return fr.RoPE(draw(g, tokens, dim // 2) * 100, pairing=pairing, applied=applied)
    if positions == "grid":
        text = min(tokens // 4, 7)
        where = grid(tokens, text, frame=int(torch.randint(3, (1,), generator=g)))
    elif positions == "line":
        where = torch.arange(tokens, device=DEVICE)[:, None].expand(-1, 3)
    else:
        where = scatter(g, tokens, batch=batch if positions == "per row" else None)
    return axial(where, dim, pairing, applied)
