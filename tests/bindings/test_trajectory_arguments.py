"""Size and guidance of a prepared reference, and what is refused."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from trajectory_runs import (
    PIPELINES,
    SIZE,
    STEPS,
    pictures,
    prepare,
    seen_in_a_run,
    text,
)

import fastrope as fr

diffusers = pytest.importorskip("diffusers")
import diffusers_hosts as hosts  # noqa: E402
import tiny_pipelines  # noqa: E402
import tiny_transformers  # noqa: E402

from fastrope.bindings.diffusers import encoding  # noqa: E402
from fastrope.bindings.diffusers.hosts import find_host  # noqa: E402


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return "flux", PIPELINES["flux"]()


def test_another_threads_calls_are_not_taken_for_the_references(flux):
    """Nor broken off: a pipeline that shares the transformer runs while the picture is encoded."""
    _, pipe = flux
    expected, (seen, *_) = prepare(flux), seen_in_a_run(flux)[0]
    call = {name: x + 1 if name.endswith("hidden_states") else x for name, x in seen.items() if name != "return_dict"}
    alone, found = tiny_transformers.run(pipe.transformer, call), []

    def elsewhere(*_):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(tiny_transformers.run, pipe.transformer, call).result())

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
    monkeypatch.setattr(encoding, "AREA", 64)
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
    ({"image": None}, "image: expected a value, for trajectory 'linear', received None"),
    ({"latents": []}, "latents: expected None, for trajectory 'linear', received list"),
    ({"trajectory": "latents"}, "latents: expected a value, for trajectory 'latents', received None"),
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
    ({"strength": 1}, "call: expected arguments of FluxPipeline that describe the reference, received 'streng"),
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
        fr.prepare_reference(tiny_pipelines.flux_pipeline(), pictures())
    img2img = diffusers.FluxImg2ImgPipeline(**{n: p for n, p in pipe.components.items() if "image" not in n})
    for other in (tiny_pipelines.qwen_pipeline(), img2img):
        with pytest.raises(NotImplementedError, match="^pipe: expected a text-to-image pipeline"):
            fr.prepare_reference(other, pictures())
    with (
        fr.apply(pipe, fr.GRAG()),
        pytest.raises(ValueError, match="^pipe: expected a pipeline without bound methods"),
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
