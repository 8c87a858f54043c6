"""The picture of the idea: what one query looks at in a reference picture, plain and under each modulation.

The queries and keys are made by hand, so that they prefer near keys of a similar colour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import fastrope as fr

from ..figures import LIGHT, Paper, as_picture, canvas, show
from . import scene

if TYPE_CHECKING:
    from PIL.Image import Image

AXES, GRID, SEED = (16, 56, 56), 64, 3
QUERY = (18, 23)  # row, column
NEAR, ALIKE, WIDTH = 3.2, 1.5, 8.0  # preference for near keys, for keys of like colour, and how like
SCALE, S_HF, S_LF, BIAS, DELTA, GAIN = 0.35, 0.0, 1.25, 1.0, 1.5, 0.5
HIDE, DRIFT, VALUE = -math.inf, 0.15, -1.0  # bias of a crop; log units per column; gain of values
NEGATIVE = (0.93, 0.2, 0.2)  # what is subtracted, red

TEXTS = {  # the formula as math text, and what it does
    "attention with RoPE": (r"$\langle R(\varphi_i)\,q_i,\ R(\varphi_j)\,k_j\rangle$",
                            "looks near, and at\nwhat is like itself"),
    "QueryScale": (r"$\varphi \rightarrow r_i\,\varphi$", "positions shrink:\nthe view widens"),
    "BandWeight": (r"$k_c \rightarrow w_c\,k_c$", "fast bands fade: likeness\ncounts, place does not"),
    "BiasDelta": (r"$k \rightarrow \lambda\mu + \delta\,(k-\mu)$", "δ is a temperature,\nλ the group's share"),
    "LogitGain": (r"$s_{ij} \rightarrow g_i\,s_{ij}$", "a crop of the keys\nquieter (or louder)"),
    "LogitBias": (r"$s_{ij} \rightarrow s_{ij} + b_i$", "weighs a crop of the\nkeys, or hides it (−∞)"),
    "KeyBias": (r"$s_{ij} \rightarrow s_{ij} + \beta_j$", "a number per key: they\ncount more to the right"),
    "ValueGain": (r"$v_j \rightarrow u_j\,v_j$", "seen alike, but what the\ncrop adds is subtracted (red)"),
}  # fmt: skip
CROPPED = ("LogitGain", "LogitBias", "ValueGain")


def tokens_of(picture: torch.Tensor) -> torch.Tensor:
    """Queries, or keys, ``(rows * columns, D)`` of a picture ``(3, rows, columns)``.

    Keys prefer near queries through the fast pairs of each axis and queries of their own colour through the slow ones:
    pair ``c`` of a token with colour ``x`` is ``(cos w_c x, sin w_c x)``, whose dot product is a kernel in the colour.
    """
    generator = torch.Generator().manual_seed(SEED)
    band = torch.cat([torch.linspace(0, 1, dim // 2) for dim in AXES])
    spatial = torch.cat([torch.zeros(AXES[0] // 2), torch.ones((AXES[1] + AXES[2]) // 2)])
    fast = NEAR * spatial * torch.exp(-0.5 * ((band - 0.27) / 0.1) ** 2)
    slow = ALIKE * spatial * (band > 0.6)
    frequencies = torch.randn(3, len(band), generator=generator) / (0.1 * WIDTH)
    phase = 2 * torch.pi * torch.rand(len(band), generator=generator)
    turn = torch.where(slow > 0, picture.flatten(1).T @ frequencies, phase)  # (tokens, pairs)
    length = fast + slow
    return torch.stack([length * turn.cos(), length * turn.sin()], dim=-1).flatten(1)


def attention_weights(q: torch.Tensor, k: torch.Tensor, **arguments) -> torch.Tensor:
    """The weights ``softmax_j(s_ij)``, ``(Sq, Sk)``, of ``q (Sq, D)`` and ``k (Sk, D)``, read through the op itself:
    with unit vectors as values, the output of attention is its weights. ``D`` keys are read by each head."""
    keys, dim = k.shape
    heads = -(-keys // dim)
    values = torch.eye(keys, heads * dim, dtype=k.dtype, device=k.device).view(1, keys, heads, dim)
    spread = (x[None, :, None].expand(-1, -1, heads, -1) for x in (q, k))
    return fr.attention(*spread, values, **arguments).flatten(2)[0, :, :keys]


def compute(device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each key adds to the output, ``(GRID, GRID)`` of every panel: its weight, times its ValueGain. And the crop
    ``(GRID, GRID)`` bool that the panels of ``CROPPED`` are about."""
    picture, mask = scene.draw_scene()
    keys = tokens_of(F.interpolate(picture[None], size=(GRID, GRID), mode="area")[0]).to(device)
    crop = scene.mask_tokens(mask, GRID, dilate=3)
    cropped = crop.flatten().to(device)
    positions = fr.TokenLayout(text=0, target=(GRID, GRID)).positions("flux").to(device)
    row = slice(QUERY[0] * GRID + QUERY[1], QUERY[0] * GRID + QUERY[1] + 1)
    ropes = dict(rope=fr.RoPE.axial(positions[row], AXES), key_rope=fr.RoPE.axial(positions, AXES))
    ramp = S_HF + (S_LF - S_HF) * torch.linspace(0, 1, AXES[1] // 2) ** 2  # from the fastest pair to the slowest
    one = torch.ones(1, device=device)
    column = torch.arange(GRID, device=device).repeat(GRID)
    modulations = (
        (), (fr.QueryScale(SCALE * one, axes=(1, 2)),),
        (fr.BandWeight(torch.cat([torch.full((AXES[0] // 2,), S_LF), ramp, ramp]).to(device)),),
        (fr.BiasDelta(BIAS, DELTA),), (fr.LogitGain(GAIN * one, keys=cropped),),
        (fr.LogitBias(HIDE, keys=cropped),), (fr.KeyBias(DRIFT * column),),
        (fr.ValueGain(VALUE, keys=cropped),),
    )  # fmt: skip
    found = (attention_weights(keys[row], keys, modulations=mods, **ropes) for mods in modulations)
    return {name: x.view(GRID, GRID).double().cpu() for name, x in zip(TEXTS, found, strict=True)}, crop


def draw(device: torch.device, paper: Paper = LIGHT) -> Image:
    """A spotlight per panel: the reference picture, lit where the query looks."""
    weights, crop = compute(device)
    picture, cell = scene.draw_scene()[0], scene.SIZE / GRID
    grid = ((torch.arange(GRID) + 0.5) * cell).numpy()
    with canvas(11.2, 7.9, paper) as figure:
        figure.get_layout_engine().set(hspace=0.03)
        panels = figure.subplots(2, len(weights) // 2).flatten()
        for ax, (name, seen) in zip(panels, weights.items(), strict=True):
            show(ax, spotlight(picture, seen / seen.abs().quantile(0.993)), paper)
            x, y = (QUERY[1] + 0.5) * cell, (QUERY[0] + 0.5) * cell
            for colour, width in (("white", 2.2), ("black", 0.8)):
                ax.plot(x, y, "o", markersize=8, fillstyle="none", markeredgecolor=colour, markeredgewidth=width)
            formula, effect = TEXTS[name]
            ax.set_title(name, fontsize=13, fontweight="bold")
            ax.set_xlabel(f"{formula}\n{effect}", fontsize=11.5, linespacing=1.45, labelpad=8, parse_math=True)
            if name in CROPPED:
                ax.contour(grid, grid, crop.float().numpy(), [0.5], colors="white", linewidths=1.2, linestyles="--")
        return as_picture(figure)


def spotlight(picture: torch.Tensor, weights: torch.Tensor):
    """Pixels ``(h, w, 3)`` of a picture ``(3, h, w)``, lit as far as ``weights (rows, columns)`` go from 0 to 1, and
    red as far as they go to -1."""
    grey = picture.mean(0, keepdim=True)
    lit = 0.34 * grey
    for part, colours in ((weights, picture), (-weights, torch.tensor(NEGATIVE)[:, None, None] * (0.5 + grey / 2))):
        light = F.interpolate(part.clamp(0, 1).sqrt()[None, None].float(), size=picture.shape[1:], mode="bilinear")[0]
        lit = lit + light * (colours - lit)
    return lit.clamp(0, 1).permute(1, 2, 0).numpy()
