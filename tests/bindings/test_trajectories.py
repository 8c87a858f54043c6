"""Reference trajectories that every host's pipeline prepares."""

from __future__ import annotations

import pytest
import torch
from trajectory_runs import (
    PIPELINES,
    SIZE,
    STEPS,
    hidden,
    loop_layout,
    pictures,
    prepare,
    seeds,
    seen_in_a_run,
    text,
)

import fastrope as fr
from fastrope.methods.trajectories import rf_inversion

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers_hosts as hosts  # noqa: E402


@pytest.fixture(scope="module", params=list(PIPELINES))
def case(request):
    torch.manual_seed(0)
    pipe = PIPELINES[request.param]()
    pipe.vae.eval()
    if request.param in ("flux2", "klein"):  # statistics that a trained model has
        pipe.vae.bn.running_mean.normal_()
        pipe.vae.bn.running_var.uniform_(0.5, 2.0)
    return request.param, pipe


def test_noise_layout_and_arguments_are_the_pipelines_own(case):
    reference = prepare(case, rows=2)
    calls, _ = seen_in_a_run(case, rows=2)
    assert torch.equal(reference.latents(0, 1.0), hidden(calls[0]))
    assert {"encoder_hidden_states", "cap_feats"} & set(reference.arguments)
    for name, value in reference.arguments.items():
        own = calls[0][name]
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            assert all(torch.equal(a, b) for a, b in zip(value, own, strict=True))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, own)
        else:
            assert value == own
    left_out = set(calls[0]) - set(reference.arguments)
    told = {n for n in left_out if calls[0][n] is not None and not n.endswith("_kwargs")}
    assert told <= {"hidden_states", "x", "timestep", "t", "return_dict"}


def test_packing_round_trip(case):
    """Clean latents, decoded by the pipeline itself, are what its VAE makes of its own code of the picture."""
    name, pipe = case
    clean = loop_layout(prepare(case).latents(0, 0.0))
    decoded = []
    real = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: decoded.append(z) or real(z, *args, **kwargs)
    try:
        from fastrope.bindings.diffusers.steering import _decode

        size = {"height": SIZE[0], "width": SIZE[1]}
        off = {"enable_prompt_rewrite": False} if name == "longcat" else {}
        off |= {"guidance_scale": 0.0} if name in ("chroma", "klein", "longcat", "ovis", "z-image") else {}
        _decode(pipe, clean, size | off | text(name, 1) | {"num_inference_steps": 1, "generator": seeds(1)})
    finally:
        pipe.vae.decode = real
    pixels = 2 * pictures() - 1
    with torch.no_grad():
        code = pipe.vae.encode(pixels.unsqueeze(2) if name == "qwen" else pixels).latent_dist.mode()
    assert decoded[0].shape == code.shape
    assert torch.allclose(decoded[0], code, atol=1e-5)


@pytest.mark.parametrize("sigma_of", ["shift 3", "shift 1", "dynamic"])
def test_linear_hits_the_schedulers_sigmas(case, sigma_of):
    """At every step of a run, ``scheduler.scale_noise`` of the clean latents; and the formula in float64."""
    _, pipe = case
    before = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=float(sigma_of[-1]) if sigma_of != "dynamic" else 1.0, use_dynamic_shifting=sigma_of == "dynamic"
    )
    try:
        reference = prepare(case)
        seen_in_a_run(case)
        scheduler = pipe.scheduler
        clean, noise = reference.latents(0, 0.0), reference.latents(0, 1.0)
        for step, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[step].item()
            out = reference.latents(step, sigma)
            scheduler._step_index = None
            scheduler.set_begin_index(step)
            assert torch.allclose(out, scheduler.scale_noise(clean, t[None], noise), rtol=0, atol=1e-6)
            exact = (1 - sigma) * clean.double() + sigma * noise.double()
            assert torch.equal(out, exact.float()) or float((out - exact).abs().max()) < 3e-7
    finally:
        pipe.scheduler = before


def model_velocity(case, reference: fr.Reference):
    """The transformer, called with the reference's arguments; Z-Image's time runs the other way and its output, too."""
    name, pipe = case
    rows = len(reference.latents(0, 0.0))

    def velocity(z: torch.Tensor, sigma: float) -> torch.Tensor:
        z = z.float()
        with torch.no_grad():
            if name == "z-image":
                out = pipe.transformer(list(z), torch.full((rows,), 1 - sigma), **reference.arguments)[0]
                return -torch.stack(out)
            return pipe.transformer(hidden_states=z, timestep=torch.full((rows,), sigma), **reference.arguments)[0]

    return velocity


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_inversion_is_the_loop_over_the_transformer(case, gamma):
    """The pipeline's walk against the pure loop around the bare transformer, at the scheduler's own sigmas."""
    _, pipe = case
    reference = prepare(case, "rf_inversion", rows=2, gamma=gamma)
    line = prepare(case, rows=2)
    seen_in_a_run(case, rows=2)
    sigmas = pipe.scheduler.sigmas.tolist()
    assert reference.latents.sigmas == tuple(sorted(sigmas))
    expected = rf_inversion(model_velocity(case, line), line.latents(0, 0.0), line.latents(0, 1.0), sigmas, gamma)
    for step, sigma in enumerate(sigmas):
        hosts.assert_same(reference.latents(step, sigma), expected(step, sigma), 1e-4)
    hosts.assert_differ(reference.latents(0, sigmas[0]), line.latents(0, 1.0))


def test_inversion_with_gamma_0_is_linear(case):
    path, line = prepare(case, "rf_inversion", gamma=0.0), prepare(case)
    assert torch.equal(path.latents(0, 1.0), line.latents(0, 1.0))
    for sigma in (*path.latents.sigmas, 0.33):
        assert torch.allclose(path.latents(0, sigma), line.latents(0, sigma), rtol=0, atol=1e-6)


def test_an_inverted_picture_comes_back(case):
    """Constant velocity: up with gamma 1, and the pipeline's own way down, to the picture's latents."""
    name, pipe = case

    def constant(module, args, out):
        first = out[0]
        flow = torch.linspace(-1, 2, first[0].numel()).view(first[0].shape)
        return ([flow] * len(first) if isinstance(first, list) else flow[None].expand_as(first), *out[1:])

    hook = pipe.transformer.register_forward_hook(constant)
    try:
        path = prepare(case, "rf_inversion", gamma=1.0)
        top, clean = (loop_layout(path.latents(0, s)) for s in (1.0, 0.0))
        # FLUX.2 packs latents that it is given, the others take them packed.
        given = top.unflatten(1, (3, 5)).permute(0, 3, 1, 2) if name in ("flux2", "klein") else top
        kept = []  # of klein, whose output is made ready for the VAE
        keep = {"callback_on_step_end": lambda pipe, n, t, tensors: kept.append(tensors["latents"]) or {}}
        _, out = seen_in_a_run(case, latents=given, **(keep if name == "klein" else {}))
    finally:
        hook.remove()
    assert float((top - clean).abs().max()) == pytest.approx(2, abs=1e-5)
    assert torch.allclose(kept[-1] if kept else out, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trajectory", ["linear", "rf_inversion"])
def test_a_batch_equals_its_rows(case, trajectory):
    both = prepare(case, trajectory, rows=2)
    name, _ = case
    for row in range(2):
        own = {n: v[row : row + 1] if isinstance(v, (torch.Tensor, list)) else v for n, v in text(name, 2).items()}
        alone = prepare(case, trajectory, image=pictures(2)[row], generator=seeds(2)[row], **own)
        for sigma in (0.0, 0.5, 0.6, 1.0):
            hosts.assert_same(both.latents(0, sigma)[row : row + 1], alone.latents(0, sigma), 1e-5)


@pytest.mark.parametrize("trajectory", ["linear", "rf_inversion"])
def test_seeds(case, trajectory):
    def top(seed: int) -> torch.Tensor:
        return prepare(case, trajectory, generator=torch.Generator().manual_seed(seed)).latents(0, 1.0)

    assert torch.equal(top(1), top(1))
    assert not torch.equal(top(1), top(2))


def test_own_latents_reach_the_transformer_as_they_are(case):
    """What a run's callback saw, step by step, is what its transformer was given."""
    kept: list[torch.Tensor] = []

    def keep(pipe, step, timestep, tensors):
        kept.append(tensors["latents"].clone())
        return {}

    watched = {} if case[0] == "longcat" else {"callback_on_step_end": keep}  # which has no callbacks
    calls, _ = seen_in_a_run(case, **watched)
    own = [loop_layout(hidden(calls[0])), *kept[:-1]] if watched else [hidden(c) for c in calls]
    reference = prepare(case, "latents", latents=own, height=SIZE[0], width=SIZE[1])
    sigmas = case[1].scheduler.sigmas.tolist()
    for step, call in enumerate(calls):
        assert torch.equal(reference.latents(step, sigmas[step]), hidden(call))
    with pytest.raises(ValueError, match=f"^latents: expected latents for step {STEPS}"):
        reference.latents(STEPS, 0.0)
    with pytest.raises(ValueError, match=r"^sigma: expected noise level .* at step 1, as the latents of the reference"):
        reference.latents(1, sigmas[2])
    with pytest.raises(ValueError, match=rf"^latents: expected {STEPS}, one per step \(num_inference_steps\)"):
        prepare(case, "latents", latents=own[:3], height=SIZE[0], width=SIZE[1])
    by_function = prepare(case, "latents", latents=lambda step, sigma: own[step], height=SIZE[0], width=SIZE[1])
    assert by_function.latents(1, 0.5) is own[1]
    with pytest.raises(ValueError, match=r"^latents\[1\]: expected \(R, ...\) of rows as the transformer takes them"):
        prepare(case, "latents", latents=[own[0], own[1][..., :1]], height=SIZE[0], width=SIZE[1])


def test_nothing_stays_behind(case):
    """Scheduler, processors, hooks and the pipeline's attributes; after errors, too."""
    _, pipe = case

    def state():
        model = pipe.transformer
        return (
            dict(pipe.__dict__), dict(pipe.scheduler.__dict__), list(model._forward_pre_hooks),
            [m.processor for m in model.modules() if hasattr(m, "processor")], set(pipe.vae.__dict__),
        )  # fmt: skip

    before = state()
    prepare(case, "rf_inversion")
    assert state() == before
    with pytest.raises(ValueError, match="image: expected latents"):
        prepare(case, height=SIZE[0], width=SIZE[1], image=pictures(), generator=None, num_images_per_prompt=2)
    assert state() == before


def test_shared_attention_takes_it(case):
    """From a picture to a target that attends to it: rows of the batch, and kept keys, say the same."""
    _, pipe = case
    reference = prepare(case, rows=2, image=pictures(2))
    method = fr.UntwistingRoPE(adain=0.0)
    plain = seen_in_a_run(case)[1]
    found = []
    for how in (reference, fr.ReferenceCache(reference)):
        with fr.apply(pipe, method, reference=how):
            found.append(seen_in_a_run(case)[1])
    hosts.assert_same(found[0], found[1], 1e-4)
    hosts.assert_differ(found[0], plain)


@pytest.mark.parametrize("kept", [False, True], ids=["rows", "kept"])
def test_a_run_asks_for_the_schedulers_sigmas(case, kept):
    """The very numbers, so that an inverted path answers with the points it stored."""
    _, pipe = case
    path = prepare(case, "rf_inversion").latents
    asked = []

    def latents(step: int, sigma: float) -> torch.Tensor:
        asked.append((step, sigma))
        return path(step, sigma)

    source = fr.Reference(latents, prepare(case).arguments)
    with fr.apply(pipe, fr.UntwistingRoPE(), reference=fr.ReferenceCache(source) if kept else source):
        seen_in_a_run(case)
    assert sorted(set(asked)) == list(enumerate(pipe.scheduler.sigmas[:-1].tolist()))
    assert all(sigma in path.sigmas for _, sigma in asked)
