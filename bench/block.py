"""The suite of whole attention blocks: QK norm, concatenation, rotation and attention of a FLUX double block.

Everybody starts from what the projections leave, ``(B, tokens, H * D)`` for text and image apart, and ends with what
the output projections take; these are left out, since they are the same for all. The host's own processor runs as
diffusers ships it, on an attention module whose projections hand over tensors that are there already. It knows the
plain case only; ours and the careful user's compute modulated ones as well, and all cases are timed in the same rounds.

The floor of the suite is cuDNN's attention alone, on q, k and v that are joined and rotated already: nothing built on
torch's kernels can be below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.nn.attention import SDPBackend

import fastrope as fr
from fastrope.joint import join
from fastrope.tolerance import Errors

from . import peers, runner
from .cases import CASES, PLAIN, Case
from .frame import Selection, Session, Task
from .names import AUTO, STOCK, STOCK_COMPILED
from .problem import Answer, Problem, Unsupported
from .workloads import WORKLOADS as ALL
from .workloads import Workload

SUITE, ROUNDS = "block", 50
WORKLOADS = {name: ALL[name] for name in ("kontext", "tiny")}
NAMES = (PLAIN, "all", "loose-levels", "grag")
EPS = 1e-6  # of FLUX's QK norms
FLOOR = "cudnn-alone"


@dataclass(frozen=True, eq=False)
class BlockProblem(Problem):
    """A problem whose q and k come from ``[text, image]`` streams that are not normalised yet; ``q, k, v`` of the base
    are joined and normalised, in the dtype of the inputs."""

    streams: tuple[fr.Stream, ...] = ()

    @classmethod
    def of(cls, workload: Workload, case: Case, device: torch.device, dtype: torch.dtype) -> BlockProblem:
        """Draw what the projections leave, and the weights of the norms."""
        g, text = torch.Generator(device).manual_seed(1), workload.tokens.text_tokens

        def norm() -> fr.Norm:
            weight = 1 + 0.1 * torch.randn(workload.dim, generator=g, device=device)
            return fr.Norm(weight.to(dtype), EPS)

        whole = workload.tensors(device, dtype)
        parts = zip(*(x.split([text, x.shape[1] - text], dim=1) for x in whole), strict=True)
        streams = tuple(fr.Stream(*(x.contiguous() for x in part), norm(), norm()) for part in parts)
        rope, modulations = workload.rope(device), case.modulations(workload, device)
        return cls(workload, *join(streams), rope, modulations, streams=streams)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`Problem.inputs`; the norms and the concatenation are part of the call."""
        return join(self.streams)

    def check(self, out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Errors:
        """See :meth:`Problem.check`; also of ``(image, text)``, ``(B, tokens, H * D)`` each."""
        if isinstance(out, tuple):
            image, text = out
            out = torch.cat([text, image], dim=1).unflatten(-1, (-1, self.workload.dim))
        return super().check(out)

    @cached_property
    def _reference(self) -> tuple[Answer, Answer]:
        wide = [_double(stream) for stream in self.streams]
        return self._answer(*join(wide)), self._answer(self.q, self.k, self.v)


def _double(stream: fr.Stream) -> fr.Stream:
    norms = (norm._replace(weight=norm.weight.double()) for norm in (stream.norm_q, stream.norm_k))
    return fr.Stream(*(x.double() for x in stream[:3]), *norms)


def tasks(selection: Selection) -> list[Task]:
    """One for each workload, with all cases in it."""
    cases = [CASES[name] for name in selection.cases_of(NAMES if selection.cases is None else CASES)]
    names = selection.peers_of(PEERS)
    workloads = selection.of(WORKLOADS) if cases and names else []
    return [Task(SUITE, w.name, None, partial(measure, workload=w, cases=cases, names=names)) for w in workloads]


def measure(session: Session, workload: Workload, cases: list[Case], names: list[str]) -> None:
    """Rows of all cases."""
    problems = {case.name: BlockProblem.of(workload, case, session.device, session.dtype) for case in cases}
    entries = [
        runner.Entry(case, name, partial(PEERS[name], problem), {"rotation": peers.INSIDE, "ours": name == AUTO})
        for case, problem in problems.items()
        for name in names
    ]
    runner.measure(session, Task(SUITE, workload.name, None, measure), entries, workload.flops, ROUNDS)


# ---- who competes ---------------------------------------------------------------------------------------------------


def ours(problem: BlockProblem) -> peers.Contestant:
    """``fr.joint_attention``, then the parts that the output projections take, as a bound processor makes them."""
    plan, streams, text = problem.plan, problem.streams, problem.workload.tokens.text_tokens

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = fr.joint_attention(streams, plan=plan).flatten(2)
        return out[:, text:].contiguous(), out[:, :text].contiguous()

    return peers.Contestant(run, problem)


def stock(problem: BlockProblem, wrap: Callable) -> peers.Contestant:
    """diffusers' processor of a FLUX double block."""
    if problem.modulations:
        raise Unsupported("the stock processor modulates nothing")
    try:
        from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
    except ImportError as error:
        raise Unsupported(f"diffusers is not installed ({error})") from error
    text, image = (tuple(x.flatten(2) for x in stream[:3]) for stream in problem.streams)
    heads, dim = problem.q.shape[2:]
    with torch.device("meta"):
        attn = FluxAttention(
            heads * dim, heads, dim, bias=True, added_kv_proj_dim=heads * dim, out_dim=heads * dim, eps=EPS,
            processor=FluxAttnProcessor(),
        )  # fmt: skip
    for names, tensors in ((("add_q_proj", "add_k_proj", "add_v_proj"), text), (("to_q", "to_k", "to_v"), image)):
        for name, x in zip(names, tensors, strict=True):
            setattr(attn, name, _Given(x))
    for names, stream in zip((("norm_added_q", "norm_added_k"), ("norm_q", "norm_k")), problem.streams, strict=True):
        for name, norm in zip(names, stream[3:], strict=True):
            getattr(attn, name).weight = torch.nn.Parameter(norm.weight, requires_grad=False)
    attn.to_out, attn.to_add_out = torch.nn.ModuleList([torch.nn.Identity()] * 2), torch.nn.Identity()
    angles = problem.rope.angles
    table = tuple(x.float().repeat_interleave(2, dim=-1) for x in (angles.cos(), angles.sin()))
    run = wrap(lambda: attn(image[0], text[0], image_rotary_emb=table))
    return peers.Contestant(run, problem)


def stock_compiled(problem: BlockProblem) -> peers.Contestant:
    """The same, compiled. Not on a CPU, where compiling takes longer than the smoke test is worth."""
    if problem.q.device.type != "cuda":
        raise Unsupported("compiled for CUDA only")
    return stock(problem, lambda f: torch.compile(f, dynamic=False))


class _Given(torch.nn.Module):
    """A projection whose result is there already."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.register_buffer("x", x, persistent=False)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.x


def careful(attend: str, stacked: bool = False) -> Callable[[BlockProblem], peers.Contestant]:
    """The careful user's, with norms and concatenation compiled into the prologue."""

    def build(problem: BlockProblem) -> peers.Contestant:
        contestant, text = peers.careful(attend, stacked)(problem), problem.workload.tokens.text_tokens

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            out = contestant.run().flatten(2)
            return out[:, text:].contiguous(), out[:, :text].contiguous()

        return peers.Contestant(run, problem)

    return build


def floor(problem: BlockProblem) -> peers.Contestant:
    """Attention alone, cuDNN's."""
    return peers.torch_sdpa(SDPBackend.CUDNN_ATTENTION)(problem)


PEERS = {
    AUTO: ours,
    STOCK: partial(stock, wrap=peers.as_is),
    STOCK_COMPILED: stock_compiled,
    "careful-cudnn": careful("cudnn"),
    "careful-cudnn-stacked": careful("cudnn", stacked=True),
    "careful-flash": careful("flash"),
    FLOOR: floor,
}
