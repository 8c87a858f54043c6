"""Steering on the lab's trained editor, with judges whose answers are written down."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from methods import tiny_run

from fastrope.methods.judges import Verdict

MOVES = {"neglect": -0.045, "suppression": 0.05, "success": 0.0}


@pytest.fixture
def call():
    """No latents: the noise comes from the generator."""
    arguments = tiny_run.arguments()
    del arguments["latents"]
    return {**arguments, "generator": torch.Generator().manual_seed(7), "output_type": "np"}


class Scripted:
    """Says what it was told to, in turn, and remembers what it was shown."""

    def __init__(self, *answers):
        self.answers, self.seen = list(answers), []

    def __call__(self, composite, estimate):
        self.seen.append((composite, estimate))
        return self.answers[len(self.seen) - 1]


def steer(pipe, method, judge, call, **kwargs):
    return fr.steer(pipe, method, judge, **kwargs, **call)


def plain(pipe, method, call):
    with fr.apply(pipe, method):
        return pipe(**{**call, "generator": call["generator"].clone_state()}).images


def steps_run(pipe) -> list:
    """Counts the transformer's calls."""
    calls = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    return calls, hook


def test_first_verdict_success_is_an_unsteered_run_to_the_bit(pipe, method, call):
    judge = Scripted("success")
    calls, hook = steps_run(pipe)
    steered = steer(pipe, method, judge, call)
    hook.remove()
    assert np.array_equal(steered.images, plain(pipe, method, call))
    assert len(calls) == 4  # the estimate costs no call of the transformer
    assert [t.value for t in steered.tries] == [0.83]
    assert steered.method.boost == 0.83
    assert np.array_equal(judge.seen[0][0], call["image"])


@pytest.mark.parametrize("answers", list(itertools.product(MOVES, repeat=2)), ids="-".join)
def test_every_sequence_of_verdicts(pipe, method, call, answers):
    """Two verdicts at most: the values tried, the verdicts recorded, and the picture that of the last value."""
    judge = Scripted(*answers)
    calls, hook = steps_run(pipe)
    steered = steer(pipe, method, judge, call, max_tries=2)
    hook.remove()
    asked = [a for n, a in enumerate(answers) if "success" not in answers[:n]]
    values = list(itertools.accumulate((MOVES[a] for a in asked), initial=0.83))
    if asked[-1] == "success":
        values.pop()
    assert [t.value for t in steered.tries] == pytest.approx(values)
    verdicts = [t.verdict.kind if t.verdict else None for t in steered.tries]
    assert verdicts == (asked if asked[-1] == "success" else [*asked, None])
    assert len(judge.seen) == len(asked)
    assert len(calls) == 3 * (len(values) - 1) + 4  # three steps a failure, one whole run
    assert [t.estimate is None for t in steered.tries] == [v is None for v in verdicts]
    expected = fr.LooseRoPE(method.saliency, method.mask, boost=steered.tries[-1].value, smooth=True)
    assert np.array_equal(steered.images, plain(pipe, expected, call))
    assert steered.method.boost == steered.tries[-1].value
    assert method.boost == 0.83


@pytest.mark.filterwarnings("ignore:fastrope. the denoising step is unknown")
def test_the_result_waits_for_a_call_of_another_thread(pipe, method, call):
    """Of the same transformer, that is under way when steering ends."""
    expected = plain(pipe, method, call)
    over, threads, begun, seen = threading.Event(), [], threading.Event(), []

    def wait(*_):
        if threads and threading.current_thread() is threads[0]:
            begun.set()
            over.wait(60)

    def copy_call(module, args, kwargs):
        seen[:] = [(args, kwargs)]

    def beside(pipe, index, timestep, tensors):
        if index == 3:
            args, kwargs = seen[0]
            threads.append(threading.Thread(target=torch.no_grad()(pipe.transformer), args=args, kwargs=kwargs))
            threads[0].start()
            assert begun.wait(60)
            threading.Timer(0.3, over.set).start()
        return tensors

    hooks = [
        pipe.transformer.register_forward_pre_hook(copy_call, with_kwargs=True),
        pipe.transformer.x_embedder.register_forward_pre_hook(wait),
    ]
    steered = steer(pipe, method, None, {**call, "callback_on_step_end": beside}, max_tries=0)
    for hook in hooks:
        hook.remove()
    threads[0].join()
    assert np.array_equal(steered.images, expected)
    fr.apply(pipe, method).remove()


def test_the_noise_is_the_same_every_time(pipe, method, call):
    judge = Scripted("neglect", "suppression", "success")
    moves = {"neglect": 0.0, "suppression": 0.0}
    steered = fr.steer(pipe, method, judge, moves=moves, **call)
    first, *others = [np.asarray(t.estimate) for t in steered.tries]
    assert len(others) == 2
    assert all(np.array_equal(first, other) for other in others)
    assert np.array_equal(call["generator"].get_state(), torch.Generator().manual_seed(7).get_state())


def test_noise_of_the_global_generator(pipe, method, call):
    del call["generator"]
    pictures = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        pictures.append(steer(pipe, method, Scripted("neglect", "success"), call).images)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_the_estimate_is_the_one_step_estimate(pipe, method, call):
    """From two samples of an unsteered run: the lab's latents are pixels."""
    judge = Scripted("success")
    steer(pipe, method, judge, call)
    samples = []

    def keep(pipe, index, timestep, tensors):
        samples.append(tensors["latents"])
        return {}

    plain(pipe, method, {**call, "callback_on_step_end": keep})
    sigma, after = pipe.scheduler.sigmas[2:4]
    velocity = (samples[1] - samples[2]) / (sigma - after)
    pixels = pipe._unpack_latents(samples[1] - sigma * velocity, 16, 16, pipe.vae_scale_factor)[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(judge.seen[0][1]) - expected).max() <= 1


def test_unreadable_answers_count_as_success(pipe, method, call):
    steered = steer(pipe, method, Scripted("what?"), call)
    assert [(t.verdict.kind, t.verdict.readable) for t in steered.tries] == [("success", False)]


def test_no_tries_is_a_plain_run(pipe, method, call):
    steered = steer(pipe, method, Scripted(), call, max_tries=0)
    assert np.array_equal(steered.images, plain(pipe, method, call))
    assert [(t.value, t.verdict) for t in steered.tries] == [(0.83, None)]


def test_runs_shorter_than_the_question_are_asked_at_their_end(pipe, method, call):
    steered = steer(pipe, method, Scripted("neglect", "success"), {**call, "num_inference_steps": 2})
    assert [t.verdict.kind for t in steered.tries] == ["neglect", "success"]


def test_the_built_in_judge(pipe, method, call):
    """The verdict is the judge's own on the estimate it was shown."""
    steered = steer(pipe, method, None, call, max_tries=1)
    measures = steered.tries[0].verdict.measures
    assert set(measures) == {"change", "kept"}
    assert all(np.isfinite(v) for v in measures.values())


def test_other_parameters_and_methods(pipe, method, call):
    """GRAG's delta, beside LooseRoPE."""
    moves = {"neglect": -0.1, "suppression": 0.2}
    judge = Scripted("suppression", "neglect")
    steered = steer(pipe, fr.GRAG(1, 1.1), judge, call, parameter="delta", max_tries=2, beside=[method], moves=moves)
    assert [t.value for t in steered.tries] == pytest.approx([1.1, 1.3, 1.2])
    with fr.apply(pipe, fr.GRAG(1, steered.tries[-1].value), method):
        expected = pipe(**{**call, "generator": call["generator"].clone_state()}).images
    assert np.array_equal(steered.images, expected)


def test_the_callers_own_callback_is_called(pipe, method, call):
    steps = []

    def mine(pipe, index, timestep, tensors):
        steps.append(index)
        return {}

    steer(pipe, method, Scripted("neglect", "success"), {**call, "callback_on_step_end": mine})
    assert steps == [0, 1, 2, 0, 1, 2, 3]


def test_the_parameter_stays_at_least_zero(pipe, method, call):
    moves = {"neglect": -2.0, "suppression": 0.05}
    steered = steer(pipe, method, Scripted("neglect", "neglect"), call, max_tries=2, moves=moves)
    assert [t.value for t in steered.tries] == pytest.approx([0.83, 0.0, 0.0])


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


@pytest.mark.parametrize("place", ["judge", "callback"])
def test_everything_is_restored_after_an_error(pipe, method, call, place):
    before = dict(pipe.transformer.attn_processors)
    kwargs = {"callback_on_step_end": fail} if place == "callback" else {}
    with pytest.raises(Broken):
        steer(pipe, method, fail if place == "judge" else Scripted("success"), {**call, **kwargs})
    after = pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert "step" not in vars(pipe.scheduler)
    assert method.boost == 0.83
    assert np.array_equal(plain(pipe, method, call), plain(tiny_run.pipeline(), method, call))


def test_everything_is_restored_after_success(pipe, method, call):
    before = dict(pipe.transformer.attn_processors)
    steer(pipe, method, Scripted("neglect", "success"), call)
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    assert "step" not in vars(pipe.scheduler)


def test_verdicts_with_numbers_reach_the_record(pipe, method, call):
    verdict = Verdict("success", "fine", measures={"score": 0.9})
    assert steer(pipe, method, Scripted(verdict), call).tries[0].verdict is verdict


@pytest.mark.parametrize(("kwargs", "name"), [
    (dict(method=object()), "method"), (dict(method=fr.GRAG()), "method"), (dict(parameter="mask"), "method.mask"),
    (dict(max_tries=-1), "max_tries"), (dict(max_tries=1.5), "max_tries"), (dict(ask_after=-1), "ask_after"),
    (dict(moves={"neglect": 1}), "moves"), (dict(judge=3), "judge"), (dict(image=None), "composite"),
    (dict(num_images_per_prompt=2), "call"),
])  # fmt: skip
def test_bad_arguments_are_named(pipe, method, call, kwargs, name):
    arguments = {**call, "method": method, "judge": Scripted("success"), **kwargs}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        fr.steer(pipe, **arguments)
    assert "step" not in vars(pipe.scheduler)


def test_other_schedulers_are_refused(pipe, method, call):
    from diffusers import FlowMatchHeunDiscreteScheduler

    other = tiny_run.pipeline()
    other.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(NotImplementedError, match=r"pipe.scheduler: expected FlowMatchEulerDiscreteScheduler"):
        steer(other, method, Scripted("success"), call)
