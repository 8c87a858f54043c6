"""Who computes: builders that turn a problem into something to time, or say why they cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastrope as fr
from fastrope.dispatch import decide

from . import fused_calls, prologue
from .materialised import materialised
from .names import APPLIED, AUTO, CUDNN, MATERIALISED, TRITON
from .problem import Problem, Unsupported, key_mask

INSIDE, BEFORE = "inside", "before"  # of the timed call: where q and k are rotated
SAGE_DIMS = (64, 96, 128)


@dataclass(frozen=True, eq=False)
class Contestant:
    """``run()`` gives ``out (B, Sq, H, D)`` of ``problem``; what happened before it is not timed."""

    run: Callable[[], torch.Tensor]
    problem: Problem


@dataclass(frozen=True)
class Peer:
    """An implementation. ``build`` raises :class:`Unsupported` where it has no answer.

    ``rotation`` says whether the timed call rotates; only equals are compared. ``ours`` tells our contestants from the
    others, ``own_plain`` has its plain call timed in the same rounds as each modulated one. One that is ``approximate``
    by design and outside the tolerance rule is left out, which is no fault of the run.
    """

    name: str
    summary: str
    build: Callable[[Problem], Contestant]
    rotation: str = INSIDE
    ours: bool = False
    own_plain: bool = False
    approximate: bool = False


def fastrope(backend: str, applied: bool = False) -> Callable[[Problem], Contestant]:
    """One of our backends with a plan made beforehand."""

    def build(problem: Problem) -> Contestant:
        problem = problem.applied if applied else problem
        q, k, v, plan = problem.q, problem.k, problem.v, problem.plan
        try:
            decide(plan.lowered, q, k, v, backend)
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
        mask = None if problem.key_mask is None else problem.key_mask[:, None, None, :]

        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale).transpose(1, 2)

        return Contestant(_tried(run), problem)

    return build


def careful(attend: str, stacked: bool = False) -> Callable[[Problem], Contestant]:
    """See :mod:`prologue`; ``attend`` names a function of :mod:`fused_calls`. Not compiled on a CPU, for tests."""

    def build(problem: Problem) -> Contestant:
        cuda, kernel = _on_cuda(problem), getattr(fused_calls, attend)
        if attend == "cudnn" and not cuda:
            raise Unsupported("cuDNN is for CUDA")
        few = problem.q[:1, :64]
        _tried(lambda: kernel(few, few, few, problem.scale))  # a compiler's failure is none of the kernel's
        return Contestant(prologue.careful(problem, kernel, stacked, _compiled if cuda else as_is), problem)

    return build


def flex_attention(problem: Problem) -> Contestant:
    """What folds into keys is folded as in :mod:`prologue`; a ``score_mod`` multiplies gains and hides masked keys. It
    sees logits, not q and k, so it cannot rotate by query."""
    if any(isinstance(m, fr.QueryScale) for m in problem.modulations):
        raise Unsupported("a score_mod cannot rotate q and k")
    if not _on_cuda(problem):
        raise Unsupported("compiled for CUDA only")
    from torch.nn.attention.flex_attention import flex_attention as attend

    gains = [m for m in problem.modulations if isinstance(m, fr.LogitGain)]
    return Contestant(flex_run(problem, gains, _compiled(attend), _compiled), problem)


def flex_run(problem: Problem, gains: list, attend: Callable, wrap: Callable) -> Callable[[], torch.Tensor]:
    """``run()`` of FlexAttention's ``attend`` behind a prologue handed to ``wrap``."""
    (_, lowered), *_ = prologue.lower(_without(problem, gains))
    tokens, device = problem.k.shape[1], problem.q.device
    tables = [(m.gain, key_mask(m.keys, tokens, device)) for m in gains]
    mask = problem.key_mask

    def score_mod(score, b, h, i, j):
        for g, covered in tables:
            score = torch.where(covered[j], score * g[i], score)
        return score if mask is None else torch.where(mask[b, j], score, -float("inf"))

    def prepare(q, k):
        return lowered.plain(q).to(q.dtype).transpose(1, 2), lowered.keys(k).transpose(1, 2)

    prepare, used = wrap(prepare), score_mod if tables or mask is not None else None
    q, k, values = problem.q, problem.k, problem.v.transpose(1, 2)
    return lambda: attend(*prepare(q, k), values, used, scale=problem.scale).transpose(1, 2)


def _without(problem: Problem, gains: list) -> Problem:
    """The problem less its gains and its mask, both of which a ``score_mod`` takes."""
    if problem.key_mask is not None and any(isinstance(m, fr.BiasDelta) for m in problem.modulations):
        raise Unsupported("the mean of a group differs from row to row of the batch")
    return replace(problem, modulations=[m for m in problem.modulations if m not in gains], key_mask=None)


def sage(problem: Problem) -> Contestant:
    """SageAttention 1: q and k in 8-bit integers. It rotates nothing and knows no mask."""
    if problem.modulations:
        raise Unsupported("no way to say any modulation")
    if problem.key_mask is not None:
        raise Unsupported("no mask")
    if not _on_cuda(problem):
        raise Unsupported("for CUDA only")
    if problem.q.shape[3] not in SAGE_DIMS:
        raise Unsupported(f"head dims {SAGE_DIMS}")
    try:
        from sageattention import sageattn
    except ImportError as error:
        raise Unsupported(f"sageattention is not installed ({error})") from error
    problem = problem.applied
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))
    return Contestant(_tried(lambda: sageattn(q, k, v, is_causal=False).transpose(1, 2)), problem)


def _on_cuda(problem: Problem) -> bool:
    return problem.q.device.type == "cuda"


def _tried(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``run``, once it has shown that torch has a kernel for it.

    Raises:
        Unsupported: it has none, in torch's words.
    """
    try:
        with warnings.catch_warnings():  # torch explains every kernel it rules out
            warnings.simplefilter("ignore")
            run()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        raise Unsupported(str(error).splitlines()[0]) from error
    return run


def as_is(function: Callable) -> Callable:
    """No compiler."""
    return function


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _peers(*peers: Peer) -> dict[str, Peer]:
    return {p.name: p for p in peers}


PEERS = _peers(
    Peer(TRITON, "fused kernels", fastrope("triton"), ours=True, own_plain=True),
    Peer(TRITON + APPLIED, "fused kernels", fastrope("triton", applied=True), BEFORE, ours=True),
    Peer(AUTO, "the backend we choose", fastrope("auto"), ours=True, own_plain=True),
    Peer(AUTO + APPLIED, "the backend we choose", fastrope("auto", applied=True), BEFORE, ours=True),
    Peer("fastrope-sdpa", "torch SDPA on modulated keys", fastrope("sdpa"), ours=True),
    Peer(CUDNN, "torch SDPA pinned to cuDNN", torch_sdpa(SDPBackend.CUDNN_ATTENTION), BEFORE),
    Peer("flash", "torch SDPA pinned to FlashAttention", torch_sdpa(SDPBackend.FLASH_ATTENTION), BEFORE),
    Peer("efficient", "torch SDPA pinned to efficient", torch_sdpa(SDPBackend.EFFICIENT_ATTENTION), BEFORE),
    Peer("careful-cudnn", "compiled prologue, cuDNN, merged by log-sum-exps", careful("cudnn")),
    Peer("careful-cudnn-stacked", "the same, levels as batch rows of one call", careful("cudnn", stacked=True)),
    Peer("careful-flash", "compiled prologue, FlashAttention-2, merged", careful("flash")),
    Peer("flex", "compiled prologue, FlexAttention", flex_attention),
    Peer("sage", "SageAttention 1, 8-bit q and k", sage, BEFORE, approximate=True),
    Peer(MATERIALISED, "all logits in memory, as published", lambda problem: Contestant(
        materialised(problem), problem)),
)  # fmt: skip
