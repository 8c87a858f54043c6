"""Who computes: builders that turn a problem into something to time, or say why they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastrope as fr
from fastrope import api

from .materialised import materialised
from .problem import Problem, Unsupported, key_mask


@dataclass(frozen=True, eq=False)
class Contestant:
    """``run()`` gives ``out (B, S, H, D)`` of ``problem``; what happened before it is not timed."""

    run: Callable[[], torch.Tensor]
    problem: Problem


@dataclass(frozen=True)
class Peer:
    """An implementation. ``build`` raises :class:`Unsupported` where it has no answer."""

    name: str
    summary: str
    build: Callable[[Problem], Contestant]


def fastrope(backend: str, applied: bool = False) -> Callable[[Problem], Contestant]:
    """One of our backends with a plan made beforehand."""

    def build(problem: Problem) -> Contestant:
        problem = problem.applied if applied else problem
        q, k, v, plan = problem.q, problem.k, problem.v, problem.plan
        try:
            api.choose(q, k, v, plan, backend)
        except NotImplementedError as error:
            raise Unsupported(str(error)) from error
        return Contestant(lambda: fr.attention(q, k, v, plan=plan, backend=backend, debug=False), problem)

    return build


def torch_sdpa(backend: SDPBackend) -> Callable[[Problem], Contestant]:
    """``scaled_dot_product_attention`` pinned to one kernel, so that no other is mistaken for it. It rotates nothing:
    q and k arrive rotated."""

    def build(problem: Problem) -> Contestant:
        if problem.modulations:
            raise Unsupported("no way to say any modulation")
        problem = problem.applied
        q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=problem.scale).transpose(1, 2)

        try:
            with warnings.catch_warnings():  # torch explains every kernel it rules out
                warnings.simplefilter("ignore")
                run()
        except RuntimeError as error:
            raise Unsupported(str(error).splitlines()[0]) from error
        return Contestant(run, problem)

    return build


def flex_attention(problem: Problem) -> Contestant:
    """A ``score_mod`` sees logits, not q and k: gains and nothing else."""
    if not all(isinstance(m, fr.LogitGain) for m in problem.modulations):
        raise Unsupported("a score_mod cannot rotate or weight q and k")
    if problem.q.device.type != "cuda":
        raise Unsupported("compiled for CUDA only")
    from torch.nn.attention.flex_attention import flex_attention as attend

    problem = problem.applied
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    score_mod = None
    if problem.modulations:
        (gain,) = problem.modulations
        g, covered = gain.gain, key_mask(gain.keys, k.shape[2], k.device)

        def score_mod(score, b, h, i, j):
            return torch.where(covered[j], score * g[i], score)

    torch.compiler.reset()  # earlier problems count towards the limit of recompilations
    compiled = torch.compile(attend, fullgraph=True)
    return Contestant(lambda: compiled(q, k, v, score_mod, scale=problem.scale).transpose(1, 2), problem)


def _peers(*peers: Peer) -> dict[str, Peer]:
    return {p.name: p for p in peers}


PEERS = _peers(
    Peer("fastrope-triton", "fused kernels, rotation included", fastrope("triton")),
    Peer("fastrope-triton-applied", "fused kernels, q and k arrive rotated", fastrope("triton", applied=True)),
    Peer("fastrope-sdpa", "torch SDPA on modulated keys, rotation included", fastrope("sdpa")),
    Peer("cudnn", "torch SDPA pinned to cuDNN, rotated before", torch_sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flash", "torch SDPA pinned to FlashAttention, rotated before", torch_sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("efficient", "torch SDPA pinned to efficient, rotated before", torch_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("flex", "FlexAttention, rotated before", flex_attention),
    Peer(
        "materialised", "all logits in memory, as published, rotation included",
        lambda problem: Contestant(materialised(problem), problem),
    ),
)  # fmt: skip
