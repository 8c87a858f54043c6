"""Section 3: what GRAG's two numbers do to a group of keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import fastrope as fr

from . import style
from .maps import AXES, common_vector, field
from .probe import attention_weights, grid_positions

SEED = 1
QUERIES = 32
COMMON, NOISE = 0.5, 0.6  # against maps.COMMON; per channel
EXAMPLE = (1.0, 1.10)


@dataclass(frozen=True)
class Groups:
    """``entropy`` (nats) inside the group and its ``mass``, both ``(lambdas, deltas)``, means over the queries."""

    lambdas: torch.Tensor
    deltas: torch.Tensor
    entropy: torch.Tensor
    mass: torch.Tensor
    mean_logit: float
    keys: int
    uniform: float  # entropy of equal weights on the group, nats


def compute(device: torch.device, grid: int = 16, steps: int = 19) -> Groups:
    """Target and reference keys in one softmax, the reference as the group; one batch row per (lambda, delta).

    Args:
        grid: side of the target and of the reference, tokens.
        steps: values of lambda and of delta, over 0.8 .. 1.7.
    """
    generator = torch.Generator().manual_seed(SEED)
    tokens = grid * grid
    common = COMMON * common_vector(generator)
    keys = torch.cat([field(grid, common, generator, NOISE) for _ in range(2)])  # target, reference
    positions = torch.cat([grid_positions(grid, grid), grid_positions(grid, grid, frame=1)])
    chosen = torch.linspace(0, tokens - 1, QUERIES).round().long()
    rope = fr.RoPE.axial(positions[chosen].to(device), AXES)
    key_rope = fr.RoPE.axial(positions.to(device), AXES)
    group = slice(tokens, 2 * tokens)
    lambdas = torch.linspace(0.8, 1.7, steps, dtype=torch.float64)
    deltas = lambdas.clone()
    entropy, mass = (torch.empty(steps, steps, dtype=torch.float64) for _ in range(2))
    q, k = keys[chosen].to(device), keys.to(device)
    for n, bias in enumerate(lambdas):
        modulation = fr.BiasDelta(torch.full_like(deltas, float(bias)).to(device), deltas.to(device), keys=group)
        weights = attention_weights(
            q.expand(steps, -1, -1), k.expand(steps, -1, -1), rope=rope, key_rope=key_rope, modulations=[modulation],
            chunk=2,
        ).double()  # fmt: skip
        inside = weights[:, :, group]
        mass[n] = inside.sum(-1).mean(-1).cpu()
        share = inside / inside.sum(-1, keepdim=True)
        entropy[n] = torch.special.entr(share).sum(-1).mean(-1).cpu()
    logit = _mean_logit(q, k[group], rope, fr.RoPE.axial(positions[group].to(device), AXES))
    return Groups(lambdas, deltas, entropy, mass, logit, tokens, float(torch.tensor(float(tokens)).log()))


def _mean_logit(q, k, rope, key_rope) -> float:
    """Mean logit of the group, read through the op: with delta = 0 every key of the group is its mean, so the
    log-sum-exp is that logit plus the log of the number of keys."""
    _, lse = fr.attention(
        q[None, :, None], k[None, :, None], k[None, :, None], rope=rope, key_rope=key_rope,
        modulations=[fr.BiasDelta(1.0, 0.0)], return_lse=True,
    )  # fmt: skip
    return float((lse.double() - torch.tensor(float(len(k))).log()).mean())


def draw(data: Groups, path: Path) -> Path:
    """The picture of :func:`compute`."""
    from matplotlib import rc_context

    lambdas, deltas, share = data.lambdas.numpy(), data.deltas.numpy(), 100 * data.mass.numpy()
    with rc_context(style.settings()):
        figure = style.new_figure(12, 4.1)
        entropy, mass, heat = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        picks = [int((data.lambdas - value).abs().argmin()) for value in (0.8, 1.0, 1.2, 1.7)]
        colours = (style.SKY, style.BLUE, style.ORANGE, style.RED)
        lines = ("-", "--", "-.", (0, (1, 1)))
        for n, (pick, colour, line) in enumerate(zip(picks, colours, lines, strict=True)):
            entropy.plot(deltas, data.entropy[pick].numpy(), color=colour, linestyle=line, linewidth=4.5 - n,
                         label=f"λ = {data.lambdas[pick]:.2g}")  # fmt: skip
            mass.plot(lambdas, share[:, pick], color=colour, linestyle=line,
                      label=f"δ = {data.deltas[pick]:.2g}")  # fmt: skip
        entropy.set_title("Inside the group: a temperature")
        entropy.set_xlabel("δ")
        entropy.set_ylabel("entropy inside the group (nats)")
        entropy.legend(title="same curve for every λ", title_fontsize=9)
        mass.set_title("Against the other keys")
        mass.set_xlabel("λ")
        mass.set_ylabel("attention on the group (%)")
        mass.set_ylim(0, 100)
        mass.legend()
        heat.grid(False)
        edges = [float(data.deltas[0]), float(data.deltas[-1]), float(data.lambdas[0]), float(data.lambdas[-1])]
        image = heat.imshow(share, origin="lower", extent=edges, aspect="auto", cmap=style.SEQUENTIAL,
                            vmin=0, vmax=80, interpolation="bilinear")  # fmt: skip
        levels = [10, 20, 30, 40, 50, 60, 70, 80]
        contour = heat.contour(deltas, lambdas, share, levels=levels, colors="white", linewidths=1)
        heat.clabel(contour, fmt="%d %%", fontsize=9, manual=_label_points(data, levels))
        heat.plot(*reversed(EXAMPLE), marker="o", color=style.RED, markeredgecolor="white", markersize=8)
        box = {"boxstyle": "round,pad=0.25", "facecolor": style.DARK.sheet, "edgecolor": "none", "alpha": 0.8}
        heat.annotate("GRAG's demo", tuple(reversed(EXAMPLE)), xytext=(9, -3), va="top", textcoords="offset points",
                      color="white", fontsize=9, bbox=box)  # fmt: skip
        heat.set_title("Attention on the group (%)")
        heat.set_xlabel("δ")
        heat.set_ylabel("λ")
        figure.colorbar(image, ax=heat, pad=0.02)
        return style.save(figure, path)


def _label_points(data: Groups, levels: list[int]) -> list[tuple[float, float]]:
    """Where the contour of each level crosses delta = 1.5: (delta, lambda), clear of the marked point."""
    column = int((data.deltas - 1.5).abs().argmin())
    mass = 100 * data.mass[:, column]
    points = []
    for level in levels:
        above = (mass >= level).nonzero().flatten()
        if len(above) and above[0] > 0:
            n = int(above[0])
            t = float((level - mass[n - 1]) / (mass[n] - mass[n - 1]))
            points.append((float(data.deltas[column]), float(data.lambdas[n - 1].lerp(data.lambdas[n], t))))
    return points
