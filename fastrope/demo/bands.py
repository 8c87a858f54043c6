"""Section 1: how fast two equal vectors lose their similarity with distance, band by band."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import fastrope as fr
from fastrope.rope import join_pairs, rotate, split_pairs

from . import style
from .untwisting import band_weights

AXES, THETA, SEED = (16, 56, 56), 10_000.0, 0
ROWS = slice(AXES[0] // 2, (AXES[0] + AXES[1]) // 2)  # the pairs of axis 1
BANDS = 4
SCALES = (1.0, 0.65, 0.3)
S_HF, S_LF, BETA = 0.25, 1.0, 2.0


@dataclass(frozen=True)
class Bands:
    """``similarity (shifts, pairs)``: mean over vectors of ``<R(p) x, R(p + shift) x>`` per pair of unit length."""

    shifts: torch.Tensor
    frequencies: torch.Tensor  # (pairs,) radians per token
    similarity: torch.Tensor
    bands: torch.Tensor  # (BANDS, shifts)
    scaled: dict[float, torch.Tensor]  # r -> whole axis, (shifts,)
    weighted: torch.Tensor  # whole axis under the band weights, (shifts,)


def compute(device: torch.device, shifts: int = 64, vectors: int = 64) -> Bands:
    """Rotate random vectors, every pair of unit length, by a growing shift along axis 1.

    A pair of unit length turned by ``shift * freq`` has similarity ``cos(shift * freq)`` with itself, whatever its
    phase, so a band's mean is the mean of its cosines: what the picture shows is checked against that.
    """
    generator = torch.Generator().manual_seed(SEED)
    positions = torch.zeros(shifts + 1, len(AXES), dtype=torch.float64)
    positions[:, 1] = torch.arange(shifts + 1)
    rope = fr.RoPE.axial(positions.to(device), AXES, THETA)
    phase = (2 * torch.pi * torch.rand(1, 1, vectors, sum(AXES) // 2, generator=generator)).to(device)
    x = join_pairs(phase.cos(), phase.sin(), rope.pairing).expand(1, shifts + 1, -1, -1)

    def similarity(r: float) -> torch.Tensor:
        turned = rotate(x, r * rope.angles, rope.pairing)
        first, second = split_pairs(turned * turned[:, :1], rope.pairing)
        return (first + second)[0, :, :, ROWS].double().mean(dim=1).cpu()  # (shifts, pairs)

    plain = similarity(1.0)
    weight = band_weights(AXES[1], S_HF, S_LF, BETA)
    return Bands(
        shifts=torch.arange(shifts + 1),
        frequencies=THETA ** (-2.0 * torch.arange(AXES[1] // 2, dtype=torch.float64) / AXES[1]),
        similarity=plain,
        bands=torch.stack([part.mean(dim=1) for part in plain.chunk(BANDS, dim=1)]),
        scaled={r: similarity(r).mean(dim=1) for r in SCALES},
        weighted=plain @ weight / weight.sum(),
    )


def draw(data: Bands, path: Path) -> Path:
    """The picture of :func:`compute`."""
    from matplotlib import rc_context

    with rc_context(style.settings()):
        figure = style.new_figure(11, 4.4)
        left, right = figure.subplots(1, 2, sharey=True)
        colours = (style.RED, style.ORANGE, style.SKY, style.BLUE)
        styles = ("-", "--", "-.", (0, (1, 1)))
        shifts = data.shifts.numpy()
        wavelength = 2 * torch.pi / data.frequencies
        for n, (band, waves) in enumerate(zip(data.bands, wavelength.chunk(BANDS), strict=True)):
            pairs = f"pairs {n * len(waves)} to {(n + 1) * len(waves) - 1}"
            label = f"{pairs}: {waves[0]:,.0f} to {waves[-1]:,.0f} tokens a turn"
            left.plot(shifts, band.numpy(), color=colours[n], linestyle=styles[n], label=label)
        left.set_title("Four bands of one axis")
        left.set_ylabel("mean similarity of equal vectors")
        for r, colour, line in zip(SCALES, (style.BLUE, style.GREEN, style.PINK), styles, strict=False):
            note = "no modulation" if r == 1 else "QueryScale"
            right.plot(shifts, data.scaled[r].numpy(), color=colour, linestyle=line, label=f"r = {r:g} ({note})")
        right.plot(shifts, data.weighted.numpy(), color=style.RED, linestyle=styles[3],
                   label=f"BandWeight: high {S_HF:g}, low {S_LF:g}, β = {BETA:g}")  # fmt: skip
        right.set_title("The whole axis, and what two modulations do to it")
        for axes in (left, right):
            axes.set_xlabel("positional shift along axis 1 (tokens)")
            axes.set_xlim(0, len(data.shifts) - 1)
            axes.set_ylim(-0.48, 1.05)
            axes.axhline(0, color=style.LIGHT.muted, linewidth=0.8)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
        return style.save(figure, path)
