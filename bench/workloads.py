"""Which tensors: shapes and token layouts of the models people run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fastrope as fr


@dataclass(frozen=True)
class Workload:
    """One attention call of a model.

    ``convention``, ``axes_dim`` and ``theta`` give positions and frequencies. ``prompts`` are the text tokens of each
    batch row that are no padding (None: all of them). ``cases`` names the cases that are measured unless others are
    asked for (None: all that suit). ``small`` workloads are for machines without a GPU.
    """

    name: str
    summary: str
    tokens: fr.TokenLayout
    batch: int = 1
    heads: int = 24
    dim: int = 128
    axes_dim: tuple[int, ...] = (16, 56, 56)
    convention: str = "flux"
    theta: float = 10_000.0
    prompts: tuple[int, ...] | None = None
    cases: tuple[str, ...] | None = None
    small: bool = False

    @property
    def flops(self) -> float:
        """Of the two products over the pairs that are not masked, ``4 H D Sq`` times the keys of every batch row. Every
        case of a workload counts the same, whatever it adds."""
        hidden = 0 if self.prompts is None else sum(self.tokens.text_tokens - n for n in self.prompts)
        return 4.0 * self.heads * self.dim * len(self.tokens) * (self.batch * self.tokens.num_keys - hidden)

    @property
    def source(self) -> slice:
        """The keys that modulations cover: those of shared references, else of all references, else the target's."""
        if self.tokens.shared_grids:
            return self.tokens.shared
        return self.tokens.references if self.tokens.reference_grids else self.tokens.target

    @property
    def source_grid(self) -> slice:
        """The part of ``source`` that a crop of the target lies over: the first reference."""
        return self.tokens.reference(0) if self.tokens.reference_grids else self.source

    def rope(self, device: torch.device) -> fr.RoPE:
        """Angles of the queries."""
        return fr.RoPE.axial(self._positions(device), self.axes_dim, self.theta)

    def key_rope(self, device: torch.device) -> fr.RoPE | None:
        """Angles of the keys; None where they are the queries' own tokens. A shared reference is a picture of its own,
        so that its tokens stand where a target's do."""
        if not self.tokens.shared_grids:
            return None
        alone = (fr.TokenLayout(0, grid) for grid in self.tokens.shared_grids)
        shared = [layout.positions(self.convention, device) for layout in alone]
        return fr.RoPE.axial(torch.cat([self._positions(device), *shared]), self.axes_dim, self.theta)

    def key_mask(self, device: torch.device) -> torch.Tensor | None:
        """``(B, Sk)`` bool, False for the padding of a prompt; None where nothing is padded."""
        if self.prompts is None:
            return None
        mask = torch.ones(self.batch, self.tokens.num_keys, dtype=torch.bool)
        for row, length in zip(mask, self.prompts, strict=True):
            row[self.tokens.text][length:] = False
        return mask.to(device)

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """``q (B, Sq, H, D)``, ``k, v (B, Sk, H, D)``, standard normal, as after QK norm. Never zeros: those multiply
        faster."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(length: int) -> torch.Tensor:
            shape = (self.batch, length, self.heads, self.dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return draw(len(self.tokens)), draw(self.tokens.num_keys), draw(self.tokens.num_keys)

    def _positions(self, device: torch.device) -> torch.Tensor:
        return self.tokens.positions(self.convention, device)


def _workloads(*workloads: Workload) -> dict[str, Workload]:
    return {w.name: w for w in workloads}


_TEXT, _SIDE = 512, (64, 64)  # of FLUX; 1024 px at 16 px a token
_KONTEXT = fr.TokenLayout(_TEXT, _SIDE, references=[_SIDE])
_ENDS = ("plain", "all", "loose-levels", "grag", "all-per-query")  # what tells most, most telling first
_FLUX2 = {"heads": 48, "axes_dim": (32, 32, 32, 32), "theta": 2000.0, "convention": "flux2"}
_TINY = {"heads": 2, "dim": 32, "axes_dim": (8, 12, 12), "small": True}

# In order of value: what a budget cuts off is at the end.
WORKLOADS = _workloads(
    Workload("kontext", "FLUX.1 Kontext, 1024 px", _KONTEXT),
    Workload(
        "tokens-33k", "Kontext at 2048 px", fr.TokenLayout(_TEXT, (128, 128), references=[(128, 128)]), cases=_ENDS
    ),
    Workload(
        "shared", "FLUX.1 whose target also sees a reference's keys", fr.TokenLayout(_TEXT, _SIDE, shared=[_SIDE])
    ),
    Workload(
        "qwen-edit", "Qwen-Image-Edit, 1024 px, prompts of 320 and 77 tokens",
        fr.TokenLayout(320, _SIDE, references=[_SIDE]), batch=2, convention="qwen", prompts=(320, 77), cases=_ENDS,
    ),
    Workload(
        "flux2", "FLUX.2, 1024 px, three references", fr.TokenLayout(_TEXT, _SIDE, references=[_SIDE] * 3),
        cases=_ENDS, **_FLUX2,
    ),
    Workload("flux", "FLUX.1, 1024 px", fr.TokenLayout(_TEXT, _SIDE), cases=_ENDS),
    Workload("kontext-b2", "FLUX.1 Kontext, two pictures", _KONTEXT, batch=2, cases=_ENDS),
    Workload("kontext-b4", "FLUX.1 Kontext, four pictures", _KONTEXT, batch=4, cases=_ENDS),
    Workload(
        "kontext-d64", "FLUX.1 Kontext's tokens with heads of 64", _KONTEXT, dim=64, axes_dim=(8, 28, 28), cases=_ENDS
    ),
    Workload("tiny", "smoke test", fr.TokenLayout(8, (8, 8), references=[(8, 8)]), **_TINY),
    Workload(
        "tiny-masked", "smoke test, prompts of 8 and 3 tokens", fr.TokenLayout(8, (6, 6), references=[(6, 6)]),
        batch=2, convention="qwen", prompts=(8, 3), cases=_ENDS, **_TINY,
    ),
    Workload("tiny-shared", "smoke test, a shared reference", fr.TokenLayout(8, (8, 8), shared=[(6, 6)]), **_TINY),
)  # fmt: skip
