"""Steering a method by a judge that sees an early estimate of the result (LooseRoPE, arXiv 2601.05127)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch

from fastrope import Site
from fastrope.checks import is_whole, require
from fastrope.methods.judges import CLASSES, MOVES, RegionJudge, Verdict, read_verdict
from fastrope.methods.schedules import require_number
from fastrope.pictures import to_picture

from .handle import bind
from .pipelines import require_euler, second_pipeline


@dataclass(frozen=True)
class Try:
    """One run from the noise.

    Args:
        value: of the parameter that moves.
        verdict: None if the judge was not asked.
        estimate: the PIL picture that was judged; None if the judge was not asked.
    """

    value: float
    verdict: Verdict | None
    estimate: Any


@dataclass(frozen=True)
class Steered:
    """The result of :func:`fastrope.steer`: the pipeline's ``output``, the ``method`` that made it, and all ``tries``
    in order."""

    output: Any
    method: Any
    tries: tuple[Try, ...]

    @property
    def images(self) -> Any:
        """Images of the output."""
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
    for name, count in (("max_tries", max_tries), ("ask_after", ask_after)):
        require(is_whole(count) and count >= 0, name, "an integer of at least 0", repr(count))
    require(set(moves) == set(CLASSES) - {"success"}, "moves", "'neglect' and 'suppression'", sorted(moves))
    require_euler(pipe, "(the estimate is x - sigma v)")
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
            run = _JudgedRun(pipe, judge, composite, ask_after, {**call, "generator": generator})
            output = run.run() if attempt < max_tries else pipe(**call, generator=_copied(generator))
            tries.append(Try(value, run.verdict, run.estimate))
            if run.verdict is None or run.verdict.kind == "success":
                break
            value = max(0.0, value + moves[run.verdict.kind])
    finally:
        handle.remove()
    return Steered(output, current.method, tuple(tries))


class _Current:
    """The method of the current try. One handle serves all tries, so a compiled model keeps its processors."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def modulations(self, site: Site):
        return self.method.modulations(site)


class _JudgedRun:
    """One run of the pipeline. The judge is asked in the middle of it, and ends it unless the verdict is success."""

    def __init__(self, pipe: Any, judge: Callable, composite: Any, ask_after: int, call: dict) -> None:
        self.pipe, self.judge, self.composite, self.ask_after, self.call = pipe, judge, composite, ask_after, call
        self.verdict: Verdict | None = None
        self.estimate = None
        self._clean: torch.Tensor | None = None

    def run(self) -> Any:
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
        callback = self.call.get("callback_on_step_end")
        answer = callback(pipe, index, timestep, tensors) if callback is not None else {}
        if self._clean is not None and self.verdict is None:
            self.estimate = _decode(pipe, self._clean, self.call)
            self.verdict = read_verdict(self.judge(self.composite, self.estimate))
            if self.verdict.kind != "success":
                pipe._interrupt = True  # what diffusers' own guide to callbacks sets
        return answer


@contextlib.contextmanager
def _watched(scheduler: Any, see: Callable[[torch.Tensor, torch.Tensor, int], None]) -> Iterator[None]:
    """Show velocity, sample and index of every step to ``see``. The difference of two samples would not do: in half
    precision, a small step leaves little of the velocity in it."""
    step, replaced = scheduler.step, scheduler.__dict__.get("step")

    def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any):
        stepped = step(model_output, timestep, sample, *args, **kwargs)
        see(model_output, sample, scheduler.step_index - 1)
        return stepped

    scheduler.step = watched
    try:
        yield
    finally:
        if replaced is None:
            del scheduler.step
        else:
            scheduler.step = replaced


def _decode(pipe: Any, latents: torch.Tensor, call: dict) -> Any:
    """Latents of the loop as a PIL picture. A second pipeline with an empty loop does what the pipeline does after
    its own loop."""
    quiet = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    scheduler = copy.deepcopy(pipe.scheduler)
    decoder = second_pipeline(pipe, lambda *_: latents, scheduler=scheduler, _progress_bar_config=quiet)
    type(decoder).interrupt = property(lambda self: True)  # its class serves this decoder alone
    unwanted = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type", "return_dict")
    call = {name: value for name, value in call.items() if name not in unwanted}
    images = decoder(**{**call, "generator": _copied(call["generator"])}, output_type="pil").images
    require(len(images) == 1, "call", "arguments that make one picture", f"{len(images)} pictures")
    return images[0]


def _copied(generator: Any) -> Any:
    """A generator, or a list of them, that draws the same numbers again."""
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
    require(callable(judge), "judge", "a function of two pictures, the name of a model, or None", repr(judge))
    return judge
