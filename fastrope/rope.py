"""Rotary position embedding: the position of every token, in radians per channel pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch

from .checks import require, require_finite, require_tensor
from .device import widest_float

PAIRINGS = ("interleaved", "half")


@dataclass(frozen=True, eq=False)
class RoPE:
    """Angles ``phi[token, pair]`` of the rotary embedding (RoFormer, arXiv 2104.09864, eq. 15).

    Args:
        angles: ``(S, D/2)`` or ``(B, S, D/2)``, radians, float32 or float64. Unwrapped: position times frequency,
            not reduced modulo 2 pi, since a scaled position multiplies the angle.
        axis: ``(D/2,)`` integers, the position axis of each pair. Only modulations with ``axes`` need it.
        pairing: ``"interleaved"`` pairs channels ``(2c, 2c + 1)`` (FLUX, Qwen-Image, Z-Image), ``"half"`` pairs
            ``(c, c + D/2)`` (Llama).
        applied: True if the tensors for :func:`fastrope.attention` are rotated by these angles already.

    It holds the given tensors and no copies, so a later write to them affects later calls. A :class:`fastrope.Plan`
    has copies.

    Raises:
        ValueError: wrong rank, dtype below float32, an axis map of another length, or an unknown pairing.
    """

    angles: torch.Tensor
    axis: torch.Tensor | None = None
    pairing: str = "interleaved"
    applied: bool = False

    def __post_init__(self) -> None:
        require_tensor("RoPE.angles", self.angles, ndim=(2, 3), shape_hint="(S, D/2) or (B, S, D/2)")
        require(
            self.angles.dtype in (torch.float32, torch.float64),
            "RoPE.angles", "float32 or float64 radians", self.angles.dtype,
        )  # fmt: skip
        if self.axis is not None:
            require_tensor("RoPE.axis", self.axis, ndim=(1,), shape_hint="(D/2,)")
            require(
                not (self.axis.is_floating_point() or self.axis.is_complex() or self.axis.dtype == torch.bool),
                "RoPE.axis", "integers", self.axis.dtype,
            )  # fmt: skip
            require(
                self.axis.shape[0] == self.angles.shape[-1],
                "RoPE.axis", f"one axis per pair, ({self.angles.shape[-1]},)", tuple(self.axis.shape),
            )  # fmt: skip
        require(self.pairing in PAIRINGS, "RoPE.pairing", f"one of {PAIRINGS}", repr(self.pairing))
        require(isinstance(self.applied, bool), "RoPE.applied", "True or False", repr(self.applied))

    @classmethod
    def axial(
        cls,
        positions: torch.Tensor,
        axes_dim: Sequence[int],
        theta: float = 10_000.0,
        pairing: str = "interleaved",
        applied: bool = False,
    ) -> RoPE:
        """Axial RoPE of image transformers: axis ``a`` owns ``axes_dim[a]`` channels with frequencies
        ``theta ** (-2 c / axes_dim[a])``.

        Args:
            positions: ``(S, axes)`` or ``(B, S, axes)``, tokens; integer, float32 or float64 (fractions are kept).
            axes_dim: channels of each axis, even; they sum to the head dim ``D``.
            theta: base of the frequencies.
            pairing, applied: as in :class:`RoPE`.

        Returns:
            A :class:`RoPE` with angles ``(S, D/2)`` or ``(B, S, D/2)``, computed and kept in float64 (float32 on
            devices without it), so that a common offset of the positions does not cost precision.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        require_tensor("positions", positions, ndim=(2, 3), shape_hint="(S, axes) or (B, S, axes)")
        require(
            positions.dtype not in (torch.float16, torch.bfloat16, torch.bool) and not positions.is_complex(),
            "positions", "integers, float32 or float64 (half precision rounds positions)", positions.dtype,
        )  # fmt: skip
        axes_dim = tuple(axes_dim)
        require(
            len(axes_dim) == positions.shape[-1],
            "axes_dim", f"one entry per position axis ({positions.shape[-1]})", axes_dim,
        )  # fmt: skip
        require(
            all(isinstance(d, int) and d >= 0 and d % 2 == 0 for d in axes_dim) and sum(axes_dim) > 0,
            "axes_dim", "even channel counts", axes_dim,
        )  # fmt: skip
        require(isinstance(theta, Real) and theta > 0, "theta", "a positive number", repr(theta))
        dtype = widest_float(positions.device)
        angles, axis = [], []
        for a, dim in enumerate(axes_dim):
            pair = torch.arange(dim // 2, dtype=dtype, device=positions.device)
            angles.append(positions[..., a, None].to(dtype) * theta ** (-2.0 * pair / max(dim, 1)))
            axis.append(torch.full((dim // 2,), a, dtype=torch.int64, device=positions.device))
        return cls(torch.cat(angles, -1), torch.cat(axis), pairing, applied)

    @property
    def pairs(self) -> int:
        """Number of rotated pairs, ``D/2``."""
        return self.angles.shape[-1]

    @property
    def tokens(self) -> int:
        """Sequence length ``S``."""
        return self.angles.shape[-2]

    def rescaled(self, factor: torch.Tensor) -> RoPE:
        """The same positions with other frequencies: angles ``factor[c] * phi[token, c]``. NTK, YaRN, DyPE and RIFLEx
        are choices of the factor, see :mod:`fastrope.methods.positions`.

        Args:
            factor: ``(D/2,)`` floating point, finite, dimensionless, per pair; 1 is neutral.

        Raises:
            ValueError: another shape or dtype, values that are not finite; angles of tensors that are rotated already
                (``applied``), because these tensors would not follow.
        """
        hint = f"({self.pairs},)"
        require_tensor("factor", factor, (1,), hint)
        require(factor.shape[0] == self.pairs, "factor", hint, tuple(factor.shape))
        require(factor.is_floating_point(), "factor", "a floating-point dtype", factor.dtype)
        require_finite("factor", factor, ("pair",))
        require(not self.applied, "RoPE.applied", "False: rescale before tensors are rotated", True)
        return replace(self, angles=self.angles * factor.to(self.angles.device, self.angles.dtype))

    def as_applied(self, applied: bool = True) -> RoPE:
        """The same angles for tensors that are (not) rotated yet."""
        return replace(self, applied=applied)


def rotate(x: torch.Tensor, angles: torch.Tensor, pairing: str) -> torch.Tensor:
    """``R(phi) x``: rotate pair ``c`` of ``x`` by ``angles[..., c]`` (RoFormer eq. 34).

    Args:
        x: ``(B, S, H, D)``.
        angles: ``(S, D/2)`` or ``(B, S, D/2)``, radians.
        pairing: see :class:`RoPE`.

    Returns:
        ``(B, S, H, D)`` in the dtype of ``x``; the rotation itself runs in float32, or float64 for float64 ``x``.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = angles.to(torch.promote_types(angles.dtype, compute))
    # Cosines of the unrounded angle: a float32 angle of 1e4 rad is already 1e-3 rad off.
    cos, sin = angles.cos().to(compute).unsqueeze(-2), angles.sin().to(compute).unsqueeze(-2)
    first, second = split_pairs(x.to(compute), pairing)
    return join_pairs(first * cos - second * sin, second * cos + first * sin, pairing).to(x.dtype)


def split_pairs(x: torch.Tensor, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second members of every pair, ``(..., D) -> 2 x (..., D/2)``."""
    if pairing == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def join_pairs(first: torch.Tensor, second: torch.Tensor, pairing: str) -> torch.Tensor:
    """Inverse of :func:`split_pairs`."""
    if pairing == "interleaved":
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)
