"""Steering a method by a judge who sees an early estimate of the result (LooseRoPE, arXiv 2601.05127)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch

from fastrope import Site
from fastrope.checks import require
from fastrope.methods.judges import CLASSES, MOVES, RegionJudge, Verdict, read_verdict
from fastrope.methods.schedules import require_number
from fastrope.pictures import to_picture

from .handle import bind


@dataclass(frozen=True)
class Try:
    """One start from the noise.

    Args:
        value: of the parameter that is moved.
        verdict: None where nobody was asked.
        estimate: the PIL picture that was judged, None likewise.
    """

    value: float
    verdict: Verdict | None
    estimate: Any


@dataclass(frozen=True)
class Steered:
    """What :func:`steer` gives: the pipeline's ``output``, the ``method`` that made it, all ``tries`` in order."""

    output: Any
    method: Any
    tries: tuple[Try, ...]

    @property
    def images(self) -> Any:
        """Of the output."""
        return self.output[0] if isinstance(self.output, tuple) else self.output.images


def steer(
    pipe: Any,
    method: Any,
    judge: Callable | str | None = None,
    max_tries: int = 4,
    *,
    parameter: str = "boost",
    moves: Mapping[str, float] = MOVES,
    ask_after: int = 2,
    composite: Any = None,
    beside: Sequence = (),
    backend: str = "auto",
    **call: Any,
) -> Steered:
    """See :func:`fastrope.steer`."""
    ok = is_dataclass(method) and parameter in {f.name for f in fields(method)}
    require(ok, "method", f"a dataclass with a field {parameter!r}", repr(type(method).__name__))
    value = getattr(method, parameter)
    require_number(f"method.{parameter}", value)
    for name, least in (("max_tries", 0), ("ask_after", 0)):
        count = {"max_tries": max_tries, "ask_after": ask_after}[name]
        ok = isinstance(count, int) and not isinstance(count, bool) and count >= least
        require(ok, name, f"an integer of at least {least}", repr(count))
    require(set(moves) == set(CLASSES) - {"success"}, "moves", "'neglect' and 'suppression'", sorted(moves))
    scheduler = getattr(pipe, "scheduler", None)
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise NotImplementedError(
            "pipe.scheduler: expected FlowMatchEulerDiscreteScheduler, whose x0 is x - sigma v, received "
            f"{type(scheduler).__name__}"
        )
    if not hasattr(type(pipe), "interrupt"):
        raise NotImplementedError(f"pipe: expected a pipeline that can be interrupted, received {type(pipe).__name__}")
    if composite is None:
        image = call.get("image")
        composite = image[0] if isinstance(image, (list, tuple)) and image else image
        require(composite is not None, "composite", "a picture, or an image in the call", None)
    composite = to_picture("composite", composite)
    judge = _find_judge(judge, method)
    generator, noise = call.pop("generator", None), call.get("latents")
    if generator is None and noise is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))

    current = _Current(method)
    tries: list[Try] = []
    handle = bind(pipe, [current, *beside], backend)
    try:
        for attempt in range(max_tries + 1):
            current.method = replace(cast(Any, method), **{parameter: value})
            asked = _Asked(pipe, judge, composite, ask_after, {**call, "generator": generator})
            output = asked.run() if attempt < max_tries else pipe(**call, generator=_copied(generator))
            tries.append(Try(value, asked.verdict, asked.estimate))
            if asked.verdict is None or asked.verdict.kind == "success":
                break
            value = max(0.0, value + moves[asked.verdict.kind])
    finally:
        handle.remove()
    return Steered(output, current.method, tuple(tries))


class _Current:
    """The method of the try at hand, behind one handle: a compiled model sees the same processors all along."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def modulations(self, site: Site):
        return self.method.modulations(site)


class _Asked:
    """One run, in the middle of which the judge is asked."""

    def __init__(self, pipe: Any, judge: Callable, composite: Any, ask_after: int, call: dict) -> None:
        self.pipe, self.judge, self.composite, self.ask_after, self.call = pipe, judge, composite, ask_after, call
        self.verdict: Verdict | None = None
        self.estimate = None
        self._clean: torch.Tensor | None = None

    def run(self):
        """The pipeline's output; of no use unless the verdict is success."""
        call = {**self.call, "generator": _copied(self.call["generator"])}
        call["callback_on_step_end"] = self._after_step
        with _watched(self.pipe.scheduler, self._see):
            return self.pipe(**call)

    def _see(self, velocity: torch.Tensor, sample: torch.Tensor, index: int) -> None:
        last = len(self.pipe.scheduler.timesteps) - 1
        if index == min(self.ask_after, last):
            sigma = self.pipe.scheduler.sigmas[index].to(sample.device, torch.float32)
            self._clean = (sample.float() - sigma * velocity.float()).to(sample.dtype)

    def _after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict) -> dict:
        theirs = self.call.get("callback_on_step_end")
        answer = theirs(pipe, index, timestep, tensors) if theirs is not None else {}
        if self._clean is not None and self.verdict is None:
            self.estimate = _decode(pipe, self._clean, self.call)
            self.verdict = read_verdict(self.judge(self.composite, self.estimate))
            if self.verdict.kind != "success":
                pipe._interrupt = True  # what diffusers' own guide to callbacks sets
        return answer


@contextlib.contextmanager
def _watched(scheduler: Any, see: Callable[[torch.Tensor, torch.Tensor, int], None]) -> Iterator[None]:
    """Show every step's velocity, sample and index to ``see``. The difference of two samples would not do: in half
    precision a small step leaves little of the velocity in it."""
    step, own = scheduler.step, scheduler.__dict__.get("step")

    def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any):
        stepped = step(model_output, timestep, sample, *args, **kwargs)
        see(model_output, sample, scheduler.step_index - 1)
        return stepped

    scheduler.step = watched
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def _decode(pipe: Any, latents: torch.Tensor, call: dict):
    """Latents of the loop as a PIL picture: a second pipeline on the same models, whose loop is empty, does what the
    pipeline does after its own."""

    class Decoder(type(pipe)):
        interrupt = property(lambda self: True)

        def prepare_latents(self, *args: Any, **kwargs: Any):
            prepared = super().prepare_latents(*args, **kwargs)
            return (latents, *prepared[1:]) if isinstance(prepared, tuple) else latents

        def maybe_free_model_hooks(self):
            """The run that this one interrupts still needs them."""

    decoder = object.__new__(Decoder)
    decoder.__dict__.update(pipe.__dict__)
    decoder.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    decoder.__dict__["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    unwanted = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type", "return_dict")
    call = {name: value for name, value in call.items() if name not in unwanted}
    images = decoder(**{**call, "generator": _copied(call["generator"])}, output_type="pil").images
    require(len(images) == 1, "call", "arguments that make one picture", f"{len(images)} pictures")
    return images[0]


def _copied(generator: Any):
    """The same numbers again."""
    if isinstance(generator, (list, tuple)):
        return [_copied(g) for g in generator]
    return None if generator is None else generator.clone_state()


def _find_judge(judge: Any, method: Any) -> Callable:
    if judge is None:
        mask = getattr(method, "mask", None)
        require(mask is not None, "judge", "a judge, for a method without a mask", None)
        return RegionJudge(cast(torch.Tensor, mask))
    if isinstance(judge, str):
        from ..transformers.judge import ChatJudge

        return ChatJudge.from_pretrained(judge)
    require(callable(judge), "judge", "a function of two pictures, the name of a model or None", repr(judge))
    return judge
