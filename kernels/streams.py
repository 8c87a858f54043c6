"""Queries, keys or values as a host's projections leave them: tokens in one or two streams, RMS norm still to come."""

from dataclasses import dataclass

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


def stream_arguments(x: Projected) -> dict:
    """What a kernel that reads rows needs to know of ``x``, by the names of its parameters. A plain tensor is its own
    second stream, which no row reaches, and has no norm. Parts whose channels lie differently, or further apart than
    int32 offsets reach, are copied."""
    streamed = isinstance(x, Streams)
    parts = x.parts if streamed else (x,)
    if parts[0].stride(3) != parts[-1].stride(3) or parts[0].stride(3) * parts[0].shape[3] >= 2**31:
        parts = tuple(part.contiguous() for part in parts)
    first, second = parts[0], parts[-1]
    weights = (x.weights if streamed else ()) or parts
    arguments = {"X": first, "X2": second, "W": weights[0], "W2": weights[-1], "STREAMS": streamed}
    for name, part in (("stride_x", first), ("stride_y", second)):
        arguments |= {f"{name}{axis}": stride for axis, stride in zip("bsh", part.stride(), strict=False)}
    eps = x.eps if streamed else (0.0,)
    return arguments | {"stride_d": first.stride(3), "split": first.shape[1], "eps": eps[0], "eps2": eps[-1]}
