"""One workload under one case: the inputs, and the reference's answer on a sample of queries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch

import fastrope as fr
from fastrope.backends import reference
from fastrope.modulations import Modulation
from fastrope.rope import rotate
from fastrope.tolerance import Errors, measure

from .cases import Case, crop
from .workloads import Workload

ALL_ROWS = 512  # sequences up to this are compared in full
EVEN_ROWS, CROP_ROWS = 96, 32  # of longer ones, as many queries spread over the sequence and over the crop
Answer = tuple[torch.Tensor, torch.Tensor]  # output (B, n, H, D) and log-sum-exp (B, H, n) of n queries


class Unsupported(Exception):
    """A contestant cannot compute the problem; the message says why."""


def key_mask(keys: slice | torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """A key set as ``(tokens,)`` bool."""
    covered = torch.zeros(tokens, dtype=torch.bool, device=device)
    covered[keys] = True
    return covered


@dataclass(frozen=True, eq=False)
class Problem:
    """``q (B, Sq, H, D)``, ``k, v (B, Sk, H, D)``, their rope, modulations and mask ``(B, Sk)``."""

    workload: Workload
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rope: fr.RoPE
    modulations: list[Modulation]
    key_rope: fr.RoPE | None = None
    key_mask: torch.Tensor | None = None

    @classmethod
    def make(cls, workload: Workload, case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
        """Draw the inputs."""
        return cls(
            workload, *workload.tensors(device, dtype), workload.rope(device), case.modulations(workload, device),
            workload.key_rope(device), workload.key_mask(device),
        )  # fmt: skip

    @cached_property
    def plain(self) -> Problem:
        """The same tensors with nothing to modulate."""
        return replace(self, modulations=[])

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.workload.dim**-0.5

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``q, k, v``, as a timed call that begins before attention gets them."""
        return self.q, self.k, self.v

    @cached_property
    def scratch(self) -> dict:
        """What contestants of this problem make once and share."""
        return {}

    @cached_property
    def plan(self) -> fr.Plan:
        """Made once: contestants are timed without it."""
        return fr.plan(
            rope=self.rope, key_rope=self.key_rope, modulations=self.modulations, key_mask=self.key_mask,
        )  # fmt: skip

    @property
    def rotation_of_keys(self) -> fr.RoPE:
        """Angles of the keys, whether they are the queries' own or not."""
        return self.key_rope or self.rope

    @cached_property
    def applied(self) -> Problem:
        """The same problem as a host's attention call sees it: q and k arrive rotated, in the dtype of the inputs."""
        ropes = self.rope, self.rotation_of_keys
        q, k = (rotate(x, rope.angles, rope.pairing) for x, rope in zip((self.q, self.k), ropes, strict=True))
        key_rope = self.key_rope and self.key_rope.as_applied()
        return replace(self, q=q, k=k, rope=self.rope.as_applied(), key_rope=key_rope)

    @property
    def grouped(self) -> Problem:
        """The same problem where two heads of the queries share one of keys and values."""
        k, v = (x[:, :, ::2].contiguous() for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    @property
    def strided(self) -> Problem:
        """The same problem with heads first in memory; with every other channel; with one head of values for all."""
        q = self.q.transpose(1, 2).contiguous().transpose(1, 2)
        k = torch.stack((self.k, self.k), dim=-1)[..., 0]
        return replace(self, q=q, k=k, v=self.v[:, :, :1].expand_as(self.v))

    @property
    def padded(self) -> Problem:
        """The same problem in rows that 16 bytes do not divide."""
        q, k, v = (torch.nn.functional.pad(x, (0, 2))[..., :-2] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    def check(self, out: torch.Tensor) -> Errors:
        """Hold ``out (B, Sq, H, D)`` against the reference under the tolerance rule.

        Raises:
            ValueError: another shape or dtype, or an element that is not finite anywhere in the output.
        """
        if out.shape != self.q.shape or out.dtype != self.q.dtype:
            raise ValueError(f"expected {tuple(self.q.shape)} {self.q.dtype}, received {tuple(out.shape)} {out.dtype}")
        if not bool(out.isfinite().all()):
            raise ValueError("expected a finite output, received NaN or infinity")
        (exact, _), (low, _) = self._reference
        return measure(out[:, self._rows], exact, low)

    def check_lse(self, lse: torch.Tensor) -> Errors:
        """The same of log-sum-exps ``(B, H, Sq)``.

        Raises:
            ValueError: another shape.
        """
        batch, queries, heads, _ = self.q.shape
        if lse.shape != (batch, heads, queries):
            raise ValueError(f"expected {(batch, heads, queries)}, received {tuple(lse.shape)}")
        (_, exact), (_, low) = self._reference
        return measure(lse[:, :, self._rows], exact, low, self.q.dtype)

    @cached_property
    def _rows(self) -> torch.Tensor:
        length = len(self.workload.tokens)
        if length <= ALL_ROWS:
            return torch.arange(length, device=self.q.device)
        inside = self.workload.tokens.target.start + crop(self.workload).nonzero().flatten()
        inside = inside[torch.linspace(0, len(inside) - 1, CROP_ROWS).long()]
        return torch.cat([torch.linspace(0, length - 1, EVEN_ROWS).long(), inside]).unique().to(self.q.device)

    @cached_property
    def _reference(self) -> tuple[Answer, Answer]:
        """In float64 and in the dtype of the inputs."""
        inputs = self.q, self.k, self.v
        return self._answer(*(x.double() for x in inputs)), self._answer(*inputs)

    @torch.no_grad()
    def _answer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Answer:
        out, lse = reference.run(q, k, v, self.plan.resolved, self.scale, return_lse=True, queries=self._rows)
        return out, cast(torch.Tensor, lse)
