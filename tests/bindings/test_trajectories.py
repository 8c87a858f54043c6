"""Reference trajectories: the mathematics on toy models, and every host's own pipeline."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastrope as fr
from fastrope.methods.trajectories import LinearTrajectory, PathTrajectory, StepTrajectory, rf_inversion

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers_hosts as hosts  # noqa: E402

from fastrope.bindings.diffusers import trajectories  # noqa: E402
from fastrope.bindings.diffusers.hosts import find_host  # noqa: E402

STEPS = 4
SIZE = (6, 10)  # of pictures: 3 x 5 tokens


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(rows: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.stack([torch.rand(3, *size, generator=torch.Generator().manual_seed(n)) for n in range(rows)])


# ---- mathematics -----------------------------------------------------------------------------------------------------

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.2, 0.0)


def euler_down(velocity, z: torch.Tensor, sigmas) -> torch.Tensor:
    for sigma, following in itertools.pairwise(sigmas):
        z = z + (following - sigma) * velocity(z, sigma)
    return z


def test_gamma_1_on_a_constant_velocity_returns_to_its_start():
    clean, flow = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    path = rf_inversion(lambda z, sigma: flow, clean, draw(2, 3, 4, seed=2), SIGMAS, gamma=1.0)
    top = path(0, 1.0)
    assert torch.allclose(top, clean + flow, rtol=0, atol=1e-14)
    back = euler_down(lambda z, sigma: flow, top, SIGMAS)
    assert torch.allclose(back, clean, rtol=0, atol=1e-14)


def test_gamma_0_ends_on_the_noise_exactly():
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        c, n = clean.to(dtype), noise.to(dtype)
        path = rf_inversion(lambda z, sigma: 100 * torch.sin(z), c, n, SIGMAS, gamma=0.0)
        assert torch.equal(path(0, 1.0).to(dtype), n)
        assert torch.equal(path(9, 0.0).to(dtype), c)


def test_gamma_0_is_the_linear_trajectory():
    clean, noise = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    path = rf_inversion(lambda z, sigma: z, clean, noise, SIGMAS, gamma=0.0)
    line = LinearTrajectory(clean, noise)
    for sigma in (*SIGMAS, 0.33, 0.97):
        assert torch.allclose(path(0, sigma), line(0, sigma), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_inversion_is_the_written_formula(gamma):
    """Euler on ``v = gamma v_model + (1 - gamma) (noise - z) / (1 - sigma)``, sigmas given rising or falling."""

    def model(z, sigma):
        return torch.tanh(z) + sigma

    clean, noise = draw(1, 5), draw(1, 5, seed=1)
    rising = SIGMAS[::-1]
    z, expected = clean, {0.0: clean}
    for sigma, following in itertools.pairwise(rising):
        v = gamma * model(z, sigma) + (1 - gamma) * (noise - z) / (1 - sigma)
        z = expected[following] = z + (following - sigma) * v
    for sigmas in (SIGMAS, rising):
        path = rf_inversion(model, clean, noise, sigmas, gamma)
        for sigma, point in expected.items():
            assert torch.allclose(path(0, sigma), point, rtol=0, atol=1e-14)


def test_a_linear_velocity_shrinks_towards_the_exact_flow():
    """``dz/dsigma = a z`` has the flow ``e^a``: the inversion is first order in the step."""
    clean = draw(1, 7)
    gaps = []
    for steps in (50, 100, 200):
        sigmas = torch.linspace(0, 1, steps + 1).double().tolist()
        top = rf_inversion(lambda z, sigma: 0.7 * z, clean, clean, sigmas, gamma=1.0)(0, 1.0)
        gaps.append(float((top - clean * math.exp(0.7)).abs().max()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_a_path_is_straight_between_its_points():
    points = [draw(3), draw(3, seed=1), draw(3, seed=2)]
    path = PathTrajectory((0.0, 0.4, 1.0), points)
    assert all(path(0, s) is p for s, p in zip((0.0, 0.4, 1.0), points, strict=True))
    assert torch.allclose(path(0, 0.1), 0.75 * points[0] + 0.25 * points[1], rtol=0, atol=1e-15)
    assert torch.allclose(path(0, 0.7), 0.5 * points[1] + 0.5 * points[2], rtol=0, atol=1e-15)
    assert path(0, 1.0 + 1e-7) is points[2]


def test_own_latents_go_by_the_step():
    own = [draw(1, 2, 3, seed=n) for n in range(3)]
    trajectory = StepTrajectory(own)
    assert [trajectory(n, 0.123) is own[n] for n in range(3)] == [True] * 3


def test_own_latents_are_of_their_noise_levels():
    own = [draw(1, 2, 3, seed=n) for n in range(3)]
    trajectory = StepTrajectory(own, sigmas=(1.0, 0.6, 0.3))
    assert trajectory(1, 0.6 + 3e-3) is own[1]  # as bfloat16 tells a timestep
    with pytest.raises(ValueError, match="^sigma: expected noise level 0.6 at step 1, .* received 0.5: another"):
        trajectory(1, 0.5)


def test_results_are_rounded_once():
    """A bfloat16 reference: the formula in float32, then one rounding."""
    clean, noise = draw(1, 64).bfloat16(), draw(1, 64, seed=1).bfloat16()
    out = LinearTrajectory(clean, noise)(0, 0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (0.7 * clean.double() + 0.3 * noise.double()).bfloat16())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LinearTrajectory(draw(1, 2), draw(1, 3)), r"noise: expected \(1, 2\), as the clean latents, received"),
    (lambda: LinearTrajectory(draw(1), draw(1))(0, 1.5), "sigma: expected a noise level in 0..1, received 1.5"),
    (lambda: PathTrajectory((0.0, 0.0), [draw(1)] * 2), "sigmas: expected noise levels that rise"),
    (lambda: PathTrajectory((0.0, 1.0), [draw(1)]), "points: expected 2, one per sigma, received 1"),
    (lambda: PathTrajectory((0.0, 1.0), [draw(1), draw(2)]), "points: expected tensors of one shape"),
    (lambda: PathTrajectory((0.0, 0.9), [draw(1)] * 2)(0, 0.95), "sigma: expected a noise level that the inverted "),
    (lambda: StepTrajectory([]), "latents: expected one tensor per step"),
    (lambda: StepTrajectory([draw(1), draw(2)]), "latents: expected one tensor per step, of one shape"),
    (lambda: StepTrajectory([draw(1)], sigmas=(1.0, 0.5)), "latents: expected 2, one per step, received 1"),
    (lambda: StepTrajectory([draw(1)])(1, 0.5), "latents: expected latents for step 1, received those of 1 steps"),
    (lambda: rf_inversion(None, draw(1), draw(1), SIGMAS, 1.5), "gamma: expected a number in 0..1, received 1.5"),
    (lambda: rf_inversion(None, draw(1), draw(1), SIGMAS, float("nan")), "gamma: expected a number in 0..1"),
    (lambda: rf_inversion(None, draw(1), draw(2), SIGMAS), "noise: expected"),
    (lambda: rf_inversion(None, draw(1), draw(1), (1.0, 0.5)), "sigmas: expected noise levels between 0 and"),
    (lambda: rf_inversion(None, draw(1), draw(1), (1.5, 0.0)), "sigmas: expected noise levels between 0 and"),
])  # fmt: skip
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# ---- pipelines -------------------------------------------------------------------------------------------------------


def kl_vae(channels: int):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    ).eval()  # fmt: skip


def with_vae(cls, transformer, channels: int = 1, nothing=hosts.NO_TEXT, **more):
    parts = dict(transformer=transformer, scheduler=hosts.scheduler(), vae=kl_vae(channels))
    return hosts.quiet(cls(**parts, **nothing, **more))


def longcat():
    wide = diffusers.LongCatImageTransformer2DModel(patch_size=1, in_channels=64, pooled_projection_dim=hosts.WIDTH,
                                                    **hosts.BLOCKS)  # fmt: skip
    pipe = with_vae(diffusers.LongCatImagePipeline, hosts.lively(wide), 16, text_processor=None)
    # The pipeline takes no embeddings alone.
    pipe._encode_prompt = lambda prompt: torch.cat([hosts.prompt(1, hosts.TEXT, len(words)) for words in prompt])
    return pipe


def klein():
    blocks = hosts.BLOCKS | {"axes_dims_rope": (4, 4, 4, 4)}
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, timestep_guidance_channels=32, mlp_ratio=2.0, rope_theta=2000,
        guidance_embeds=False, **blocks,
    )  # fmt: skip
    parts = hosts.flux2_pipeline(hosts.lively(transformer)).components
    return hosts.quiet(diffusers.Flux2KleinPipeline(**parts))


PIPELINES = {
    "flux": lambda: with_vae(diffusers.FluxPipeline, hosts.build_flux(), nothing=hosts.NO_TEXT_2),
    "kontext": hosts.kontext_pipeline,
    "chroma": lambda: with_vae(diffusers.ChromaPipeline, hosts.build_chroma()),
    "longcat": longcat,
    "ovis": lambda: with_vae(diffusers.OvisImagePipeline, hosts.build_ovis()),
    "flux2": hosts.flux2_pipeline,
    "klein": klein,
    "qwen": lambda: hosts.qwen_pipeline(diffusers.QwenImagePipeline),
    "z-image": lambda: with_vae(diffusers.ZImagePipeline, hosts.build_z_image(), 2),
}


@pytest.fixture(scope="module", params=list(PIPELINES))
def case(request):
    torch.manual_seed(0)
    pipe = PIPELINES[request.param]()
    pipe.vae.eval()
    if request.param in ("flux2", "klein"):  # statistics that a trained model has
        pipe.vae.bn.running_mean.normal_()
        pipe.vae.bn.running_var.uniform_(0.5, 2.0)
    return request.param, pipe


def text(name: str, rows: int) -> dict:
    embeds = hosts.prompt(rows, hosts.TEXT)
    if name == "longcat":
        return {"prompt": ["ink" * n for n in range(rows)]}
    if name == "z-image":
        return {"prompt_embeds": list(embeds)}
    more = {}
    if name in ("flux", "kontext"):
        more = {"pooled_prompt_embeds": hosts.prompt(rows, 1, 3)[:, 0]}
    if name == "kontext":
        more |= {"max_area": math.prod(SIZE), "_auto_resize": False}
    if name in ("chroma", "qwen"):
        mask = {"chroma": "prompt_attention_mask", "qwen": "prompt_embeds_mask"}[name]
        more = {mask: torch.ones(rows, hosts.TEXT, dtype=torch.bool)}
    return {"prompt_embeds": embeds, **more}


def seeds(rows: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(40 + n) for n in range(rows)]


def prepare(case, trajectory: str = "linear", rows: int = 1, **more) -> fr.Reference:
    name, pipe = case
    given = {"generator": seeds(rows), "num_inference_steps": STEPS, **text(name, rows), **more}
    given.setdefault("image", pictures(rows) if trajectory != "latents" else None)
    return fr.prepare_reference(pipe, given.pop("image"), trajectory, **given)


def seen_in_a_run(case, rows: int = 1, **more) -> tuple[list[dict], object]:
    """What the pipeline itself tells its transformer, call by call, and its output."""
    name, pipe = case
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(zip(("x", "t", "cap_feats"), args, strict=False)) | kwargs),
        with_kwargs=True,
    )
    size = {"height": SIZE[0], "width": SIZE[1]}
    off = {} if name in ("flux", "kontext", "flux2", "qwen") else {"guidance_scale": 0.0}
    off |= {"enable_prompt_rewrite": False} if name == "longcat" else {}
    given = size | off | text(name, rows) | {"num_inference_steps": STEPS, "generator": seeds(rows)} | more
    try:
        with torch.no_grad():
            out = pipe(**given, output_type="latent", return_dict=False)[0]
    finally:
        hook.remove()
    return calls, out


def hidden(call: dict) -> torch.Tensor:
    found = call.get("hidden_states", call.get("x"))
    return torch.stack(found) if isinstance(found, list) else found


def loop_layout(latents: torch.Tensor) -> torch.Tensor:
    """The transformer's input as the pipeline's loop has it."""
    return latents.squeeze(2) if latents.ndim == 5 else latents


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


# ---- size, guidance, refusals ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return "flux", PIPELINES["flux"]()


def test_another_threads_calls_are_not_taken_for_the_references(flux):
    """Nor broken off: a pipeline that shares the transformer runs while the picture is encoded."""
    _, pipe = flux
    expected, (seen, *_) = prepare(flux), seen_in_a_run(flux)[0]
    call = {name: x + 1 if name.endswith("hidden_states") else x for name, x in seen.items() if name != "return_dict"}
    alone, found = hosts.run(pipe.transformer, call), []

    def elsewhere(*_):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(hosts.run, pipe.transformer, call).result())

    watch = pipe.vae.encoder.register_forward_pre_hook(elsewhere)
    try:
        reference = prepare(flux)
    finally:
        watch.remove()
    assert torch.equal(found[0], alone)
    assert list(reference.arguments) == list(expected.arguments)
    assert all(torch.equal(x, expected.arguments[name]) for name, x in reference.arguments.items())


def sized(flux, image, **size) -> tuple[int, int]:
    """Rows and columns of tokens."""
    ids = prepare(flux, image=image, **size).arguments["img_ids"]
    return tuple(int(n) + 1 for n in ids[:, 1:].amax(dim=0))


def test_sizes(flux):
    from PIL import Image

    assert sized(flux, pictures(size=(7, 11))[0]) == (3, 5)  # cut to whole tokens
    assert sized(flux, Image.new("RGB", (11, 7))) == (3, 5)
    assert sized(flux, pictures(), height=8, width=4) == (4, 2)
    assert sized(flux, pictures(), height=12) == (6, 10)  # the other by proportion
    assert sized(flux, pictures(), width=20) == (6, 10)


def test_large_pictures_are_made_smaller(flux, monkeypatch):
    monkeypatch.setattr(trajectories, "AREA", 64)
    assert sized(flux, pictures(size=(32, 8))) == (8, 2)
    assert sized(flux, pictures(size=(32, 8)), height=32, width=8) == (16, 4)


def test_pil_pictures_and_tensors_agree(flux):
    import numpy as np
    from PIL import Image

    data = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    tensor = torch.from_numpy(data).permute(2, 0, 1) / 255
    from_pil, from_tensor = (prepare(flux, image=x).latents(0, 0.0) for x in (Image.fromarray(data), tensor))
    assert torch.allclose(from_pil, from_tensor, atol=1e-5)


def test_pictures_of_other_proportions_are_cropped(flux):
    """The middle of a wide picture."""
    import numpy as np
    from PIL import Image

    data = np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8)
    whole, middle = Image.fromarray(data), Image.fromarray(data[:, 2:8].copy())
    out, expected = (prepare(flux, image=x, height=6, width=6).latents(0, 0.0) for x in (whole, middle))
    assert torch.allclose(out, expected, atol=1e-5)


def test_noise_levels_follow_the_references_token_count(flux):
    """Dynamic shifting: more tokens, more noise; a target of another size finds the path in between."""
    _, pipe = flux
    before = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4,
                                                               max_image_seq_len=64)  # fmt: skip
    try:
        small, large = (prepare(flux, "rf_inversion", image=pictures(size=s)) for s in ((4, 4), (12, 16)))
    finally:
        pipe.scheduler = before
    assert all(a < b for a, b in zip(small.latents.sigmas[1:-1], large.latents.sigmas[1:-1], strict=True))
    sigma = small.latents.sigmas[2]
    low, high = next(s for s in itertools.pairwise(large.latents.sigmas) if s[0] < sigma < s[1])
    share = (sigma - low) / (high - low)
    expected = (1 - share) * large.latents(0, low).double() + share * large.latents(0, high).double()
    assert torch.allclose(large.latents(1, sigma).double(), expected, atol=1e-6)


def test_guidance_is_the_references_own():
    torch.manual_seed(0)
    pipe = PIPELINES["flux2"]()
    reference = prepare(("flux2", pipe), guidance_scale=7.0)
    assert reference.arguments["guidance"].tolist() == [7.0]


def test_half_precision(flux):
    torch.manual_seed(0)
    pipe = PIPELINES["flux"]().to(torch.bfloat16)
    words = {n: v.bfloat16() for n, v in text("flux", 1).items()}
    reference = prepare(("flux", pipe), "rf_inversion", **words)
    assert reference.latents(0, 0.4).dtype == torch.bfloat16
    assert reference.latents.points[2].dtype == torch.float32  # the walk itself is not rounded
    assert reference.latents(0, 1.0).isfinite().all()


def test_prompts_are_repeated_for_every_picture():
    torch.manual_seed(0)
    pipe, asked = PIPELINES["longcat"](), []
    real = pipe._encode_prompt
    pipe._encode_prompt = lambda prompt: asked.append(prompt) or real(prompt)
    for given, rows in (({}, 2), ({"prompt": "ink"}, 2), ({"prompt": ["ink", "oil"]}, 2), ({"prompt": "ink"}, 1)):
        fr.prepare_reference(pipe, pictures(rows), num_inference_steps=STEPS, **given)
    assert asked == [["", ""], ["ink", "ink"], ["ink", "oil"], ["ink"]]


@pytest.mark.parametrize(("given", "message"), [
    ({"trajectory": "ddim"}, r"trajectory: expected one of \('linear', 'rf_inversion', 'latents'\), received 'ddim'"),
    ({"gamma": 2}, "gamma: expected a number in 0..1, received 2"),
    ({"image": None}, "image: expected something, for trajectory 'linear', received None"),
    ({"latents": []}, "latents: expected None, for trajectory 'linear', received list"),
    ({"trajectory": "latents"}, "latents: expected something, for trajectory 'latents', received None"),
    ({"trajectory": "latents", "latents": [0]}, "image: expected None, for trajectory 'latents', received Tensor"),
    ({"trajectory": "latents", "latents": [], "image": None}, "latents: expected one tensor per step"),
    ({"trajectory": "latents", "latents": [0], "image": None, "height": 6, "width": 10}, r"latents\[0\]: expected"),
    ({"image": []}, "image: expected at least one picture, received none"),
    ({"image": ["ref.png"]}, r"image: expected PIL pictures or tensors, received \['str'\]"),
    ({"image": torch.zeros(1, 6, 10)}, r"image: expected tensors \(3, H, W\)"),
    ({"image": [torch.zeros(3, 6, 10), torch.zeros(3, 6, 8)]}, "image: expected tensors .* of one size"),
    ({"image": torch.full((3, 6, 10), 200.0)}, "image: expected values in 0..1, received 200..200"),
    ({"image": -pictures()}, "image: expected values in 0..1, received -"),
    ({"height": 0}, "height: expected a positive number of pixels, received 0"),
    ({"height": 6, "width": 10.0}, "width: expected a positive number of pixels, received 10.0"),
    ({"strength": 1}, "call: expected arguments of FluxPipeline that say something of the reference, received 'streng"),
    ({"output_type": "pil"}, "call: expected arguments of FluxPipeline"),
    ({"image": pictures(2)}, "prompt_embeds: expected 2 rows, one per picture, received 1"),
    ({"prompt": ["a", "b"], "prompt_embeds": None}, "prompt: expected 1 rows, one per picture, received 2"),
])  # fmt: skip
def test_refusals_are_named(flux, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare(flux, **({"image": pictures()} | given))


def test_what_cannot_run_is_named(flux):
    _, pipe = flux
    with pytest.raises(ValueError, match="^pipe: expected a diffusers pipeline with a transformer"):
        fr.prepare_reference(object(), pictures())
    with pytest.raises(ValueError, match="^pipe.vae: expected a VAE"):
        fr.prepare_reference(hosts.flux_pipeline(), pictures())
    img2img = diffusers.FluxImg2ImgPipeline(**{n: p for n, p in pipe.components.items() if "image" not in n})
    for other in (hosts.qwen_pipeline(), img2img):
        with pytest.raises(NotImplementedError, match="^pipe: expected a pipeline that draws from a prompt alone"):
            fr.prepare_reference(other, pictures())
    with (
        fr.apply(pipe, fr.GRAG()),
        pytest.raises(ValueError, match="^pipe: expected one that no method is bound to"),
    ):
        prepare(flux, "rf_inversion")
    before = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    try:
        with pytest.raises(NotImplementedError, match="^pipe.scheduler: expected FlowMatchEulerDiscreteScheduler"):
            prepare(flux, "rf_inversion")
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("trajectory", ["linear", "rf_inversion"])
def test_a_compiled_transformer(flux, trajectory):
    _, pipe = flux
    plain, model = prepare(flux, trajectory), pipe.transformer
    pipe.transformer = torch.compile(model, backend="eager")
    try:
        compiled = prepare(flux, trajectory)
    finally:
        pipe.transformer = model
        torch._dynamo.reset()
    hosts.assert_same(compiled.latents(0, 0.6), plain.latents(0, 0.6), 1e-5)
    assert set(compiled.arguments) == set(plain.arguments)


def test_a_bound_pipeline_still_takes_a_linear_reference(flux):
    _, pipe = flux
    free = prepare(flux)
    with fr.apply(pipe, fr.GRAG()):
        assert torch.equal(prepare(flux).latents(0, 0.5), free.latents(0, 0.5))


def test_every_host_is_here():
    known = {find_host(build().transformer).transformer for build in PIPELINES.values()}
    from fastrope.bindings.diffusers.hosts import HOSTS

    assert known == {row.transformer for row in HOSTS if row.package == "diffusers"}
