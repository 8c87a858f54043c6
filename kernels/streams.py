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

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts, which agree."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the parts, which agree."""
        return self.parts[0].device


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
