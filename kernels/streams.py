"""Queries, keys or values as a host's projections leave them: tokens in one or two streams, RMS norm still to come."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Streams:
    """Tokens ``(B, S1 + S2, H, D)`` that kernels join and normalise while they read them.

    parts: one or two ``(B, Si, H, D)``, any strides. weights: ``(D,)`` of each part's RMS norm; none for values, which
    have no norm and are not rotated. eps: of each.
    """

    parts: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...] = ()
    eps: tuple[float, ...] = (0.0,)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, S, H, D)``."""
        batch, _, heads, dim = self.parts[0].shape
        return batch, sum(x.shape[1] for x in self.parts), heads, dim

    def joined(self) -> torch.Tensor:
        """``(B, S, H, D)`` by torch's operations."""
        norms = zip(self.weights, self.eps, strict=True) if self.weights else ()
        parts = [rms_norm(x, *norm) for x, norm in zip(self.parts, norms, strict=True)] if norms else self.parts
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts, which agree."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the parts, which agree."""
        return self.parts[0].device


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``weight (D,) * x / sqrt(mean(x**2) + eps)`` in float32 (float64 for such), rounded once to its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight.to(wide.dtype)).to(x.dtype)


Projected = torch.Tensor | Streams  # queries, keys or values (B, S, H, D), joined or not yet


def joined(x: Projected) -> torch.Tensor:
    """``(B, S, H, D)``: tokens as they are, or :meth:`Streams.joined`."""
    return x.joined() if isinstance(x, Streams) else x


def stream_tensors(x: Projected) -> dict[str, torch.Tensor]:
    """What a kernel reads of ``x``, by the names of its parameters: two streams and the weights of their norms. A plain
    tensor is its own second stream, which no row reaches, and has no norm. Parts whose channels lie differently, or
    further apart than int32 offsets reach, are copied."""
    streamed = isinstance(x, Streams)
    parts = x.parts if streamed else (x,)
    apart = parts[0].stride(3)
    if apart != parts[-1].stride(3) or apart * parts[0].shape[3] >= 2**31:
        parts = tuple(part.contiguous() for part in parts)
    weights = (x.weights if streamed else ()) or parts
    return {"X": parts[0], "X2": parts[-1], "W": weights[0], "W2": weights[-1]}


def stream_facts(x: Projected) -> tuple[bool, tuple[float, ...]]:
    """Whether ``x`` comes in streams, and the eps of their norms."""
    return (True, x.eps) if isinstance(x, Streams) else (False, (0.0,))


def stream_arguments(at: dict[str, Any], streamed: bool, eps: tuple[float, ...]) -> dict[str, Any]:
    """What a kernel needs to know of :func:`stream_tensors` beside them, by the names of its parameters. ``at`` has
    their layouts."""
    arguments: dict[str, Any] = {"STREAMS": streamed, "eps": eps[0], "eps2": eps[-1]}
    for name, part in (("stride_x", at["X"]), ("stride_y", at["X2"])):
        arguments |= {f"{name}{axis}": stride for axis, stride in zip("bsh", part.strides, strict=False)}
    return arguments | {"stride_d": at["X"].strides[3], "split": at["X"].shape[1]}
