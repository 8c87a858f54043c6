"""Which tensors: shapes and token layouts of the models people run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastrope as fr


@dataclass(frozen=True)
class Workload:
    """One attention call of a model.

    ``convention`` and ``axes_dim`` give positions and frequencies. ``small`` workloads are for machines without a GPU.
    """

    name: str
    summary: str
    tokens: fr.TokenLayout
    batch: int = 1
    heads: int = 24
    dim: int = 128
    axes_dim: tuple[int, ...] = (16, 56, 56)
    convention: str = "flux"
    small: bool = False

    @property
    def flops(self) -> float:
        """Of the two products, ``4 B H S^2 D``. Every case of a workload counts the same, whatever it adds."""
        return 4.0 * self.batch * self.heads * len(self.tokens) ** 2 * self.dim

    @property
    def source(self) -> slice:
        """The keys that modulations cover: the first reference, or the target where there is none."""
        return self.tokens.reference(0) if self.tokens.reference_grids else self.tokens.target

    def rope(self, device: torch.device) -> fr.RoPE:
        """Angles of all tokens."""
        return fr.RoPE.axial(self.tokens.positions(self.convention, device), self.axes_dim)

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """``q, k, v (B, S, H, D)``, standard normal, as after QK norm. Never zeros: those multiply faster."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, len(self.tokens), self.heads, self.dim)
        return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))


def _workloads(*workloads: Workload) -> dict[str, Workload]:
    return {w.name: w for w in workloads}


_FLUX = fr.TokenLayout(text=512, target=(64, 64))
_KONTEXT = fr.TokenLayout(text=512, target=(64, 64), references=[(64, 64)])
_TINY = fr.TokenLayout(text=8, target=(8, 8), references=[(8, 8)])

WORKLOADS = _workloads(
    Workload("kontext", "FLUX.1 Kontext, 1024 px", _KONTEXT),
    Workload("flux", "FLUX.1, 1024 px", _FLUX),
    Workload("kontext-b2", "FLUX.1 Kontext, two pictures", _KONTEXT, batch=2),
    Workload("kontext-d64", "FLUX.1 Kontext's tokens with heads of 64", _KONTEXT, dim=64, axes_dim=(8, 28, 28)),
    Workload("tiny", "smoke test", _TINY, heads=2, dim=32, axes_dim=(8, 12, 12), small=True),
)
