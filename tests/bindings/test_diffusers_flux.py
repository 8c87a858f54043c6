"""The binding on tiny FLUX.1 and Kontext pipelines, against a processor written here from the formulas."""

from __future__ import annotations

import types

import pytest
import torch

import fastrope as fr

diffusers = pytest.importorskip("diffusers")
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

AXES = (4, 4, 8)
DIM = sum(AXES)
TEXT = 5
TARGET, REFERENCE = (3, 5), (2, 3)  # odd grids, no two alike
LAYOUT = fr.TokenLayout(TEXT, TARGET, [REFERENCE])
LAYERS = 4


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors of a few hundred elements: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def transformer():
    """Two double-stream and two single-stream blocks, float64, so that comparisons are sharp."""
    return build_transformer(4).double()


def build_transformer(channels: int) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=channels, num_layers=2, num_single_layers=2, attention_head_dim=DIM,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=AXES,
    )  # fmt: skip
    with torch.no_grad():  # the stock initialisation is so small that attention hardly shows in the output
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.1)
            if "norm_" in name and "linear" not in name:
                weight.fill_(1.5)
    return model.eval()


def build_call(layout: fr.TokenLayout = LAYOUT, batch: int = 2, dtype=torch.float64, channels: int = 4) -> dict:
    """Arguments of the transformer; everything differs between the rows of the batch."""
    ids = layout.positions("flux").to(dtype)
    return {
        "hidden_states": torch.randn(batch, len(layout) - layout.text_tokens, channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, layout.text_tokens, 32, dtype=dtype),
        "pooled_projections": torch.randn(batch, 32, dtype=dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "txt_ids": ids[layout.text],
        "img_ids": ids[layout.text_tokens :],
    }


def run(model, call: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def modulations(layout: fr.TokenLayout = LAYOUT, batch: int | None = None) -> list:
    """All four kinds; the reference's keys and the target's queries, as the methods use them."""
    scale = torch.ones(batch or 1, len(layout), dtype=torch.float64)
    gain = scale.clone()
    for row in range(len(scale)):
        scale[row, layout.target] = torch.linspace(0.5, 1, layout.target.stop - layout.target.start).double() / (
            row + 1
        )
        gain[row, layout.target] = 1.3 + row
    if batch is None:
        scale, gain = scale[0], gain[0]
    return [
        fr.QueryScale(scale, keys=layout.references, axes=(1, 2)),
        fr.BandWeight(torch.linspace(0.25, 1.4, DIM // 2), keys=layout.references),
        fr.BiasDelta(1.2, 0.7, keys=layout.reference(0)),
        fr.LogitGain(gain, keys=slice(layout.references.start, layout.references.start + 2)),
    ]


class Formulas:
    """Attention of FLUX with modulations, read off their formulas: logits and weights of every pair in full."""

    def __init__(self, ids: torch.Tensor, mods: list):
        self.ids = ids.double()
        self.mods = mods

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        image = self.heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            return self.attend(*image)
        text = self.heads(
            attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q,
            attn.norm_added_k,
        )  # fmt: skip
        out = self.attend(*(torch.cat([t, i], dim=1) for t, i in zip(text, image, strict=True)))
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, length:]), attn.to_add_out(out[:, :length])

    @staticmethod
    def heads(attn, x, to_q, to_k, to_v, norm_q, norm_k):
        q, k, v = (to(x).reshape(*x.shape[:2], attn.heads, -1) for to in (to_q, to_k, to_v))
        return norm_q(q), norm_k(k), v

    def attend(self, q, k, v):
        batch, length, _, dim = q.shape
        frequencies = [10_000.0 ** (-torch.arange(0, d, 2).double() / d) for d in AXES]
        angles = torch.cat([self.ids[:, a, None] * f for a, f in enumerate(frequencies)], dim=1)
        axis = torch.cat([torch.full((d // 2,), a) for a, d in enumerate(AXES)])
        # One angle per batch row, query, key and pair: phi' on either side.
        factor = torch.ones(batch, length, length, dim // 2, dtype=torch.float64)
        weight = torch.ones(length, dim // 2, dtype=torch.float64)
        gain = torch.ones(batch, length, length, dtype=torch.float64)
        group = []
        for m in self.mods:
            keys = torch.zeros(length, dtype=torch.bool)
            keys[m.keys] = True
            if isinstance(m, fr.QueryScale):
                pairs = torch.isin(axis, torch.tensor(m.axes))
                r = m.scale.double().reshape(-1, length, 1, 1).expand(batch, length, length, dim // 2)
                factor = torch.where(keys[:, None] & pairs, r, factor)
            elif isinstance(m, fr.BandWeight):
                weight = weight * torch.where(keys[:, None], m.weight.double(), 1.0)
            elif isinstance(m, fr.BiasDelta):
                group.append((keys, m.bias, m.delta))
            else:
                g = m.gain.double().reshape(-1, length, 1)
                gain = gain * torch.where(keys, g, 1.0)
        q = torch.view_as_complex(q.unflatten(-1, (-1, 2)))  # (B, S, H, pairs)
        k = torch.view_as_complex(k.unflatten(-1, (-1, 2)))
        turn_q = torch.exp(1j * factor * angles[:, None])  # (B, Sq, Sk, pairs)
        turn_k = torch.exp(1j * factor * angles[None, :])
        k_hat = torch.einsum("bjhc,bijc->bijhc", k, turn_k)
        for keys, bias, delta in group:
            mu = k_hat[:, :, keys].mean(dim=2, keepdim=True)
            k_hat = torch.where(keys[:, None, None], bias * mu + delta * (k_hat - mu), k_hat)
        k_hat = k_hat * weight[:, None, :]
        s = torch.einsum("bihc,bijc,bijhc->bhij", q.conj(), turn_q.conj(), k_hat).real
        p = (s * gain[:, None] * dim**-0.5).softmax(dim=-1)
        return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v).flatten(2)


def by_formulas(model, call: dict, mods: list, layers=range(LAYERS)) -> torch.Tensor:
    """The model's output with the formulas in some layers and the stock processor in the others."""
    before = model.attn_processors
    ids = torch.cat([call["txt_ids"], call["img_ids"]])
    mixed = {
        name: Formulas(ids, mods) if n in layers else processor for n, (name, processor) in enumerate(before.items())
    }
    model.set_attn_processor(mixed)
    try:
        return run(model, call)
    finally:
        model.set_attn_processor(before)


def assert_same(out: torch.Tensor, expected: torch.Tensor) -> None:
    # Stock layers rotate in float32 even in a float64 model.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def assert_differ(out: torch.Tensor, other: torch.Tensor) -> None:
    assert float((out - other).abs().max()) > 1e-2


class Recorder:
    """A method that remembers its sites and answers with modulations where ``when(site)`` holds."""

    def __init__(self, mods=(), when=lambda site: True):
        self.mods, self.when, self.sites = list(mods), when, []

    def modulations(self, site):
        self.sites.append(site)
        return self.mods if self.when(site) else []


# ---- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("per_row", [False, True])
def test_modulated_forward_follows_the_formulas(transformer, backend, per_row):
    call = build_call()
    mods = modulations(batch=2 if per_row else None)
    expected = by_formulas(transformer, call, mods)
    stock = run(transformer, call)
    with fr.apply(transformer, *mods, backend=backend):
        out = run(transformer, call)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert_differ(out, stock)


@pytest.mark.parametrize("index", range(4))
def test_each_modulation_alone(transformer, index):
    call = build_call()
    mods = modulations()[index : index + 1]
    with fr.apply(transformer, mods, backend="sdpa"):
        out = run(transformer, call)
    torch.testing.assert_close(out, by_formulas(transformer, call, mods), rtol=1e-9, atol=1e-9)
    assert_differ(out, run(transformer, call))


def test_formulas_without_modulations_are_the_stock_model(transformer):
    call = build_call()
    assert_same(by_formulas(transformer, call, []), run(transformer, call))


def test_text_to_image_without_reference(transformer):
    layout = fr.TokenLayout(TEXT, TARGET)
    call = build_call(layout, batch=1)
    scale = torch.linspace(0.2, 1, len(layout))
    mods = [fr.QueryScale(scale, keys=layout.target, axes=(1, 2)), fr.BiasDelta(0.8, 1.3, keys=layout.text)]
    with fr.apply(transformer, mods):
        out = run(transformer, call)
    torch.testing.assert_close(out, by_formulas(transformer, call, mods), rtol=1e-9, atol=1e-9)


def test_fused_projections(transformer):
    call, mods = build_call(), modulations()
    expected = by_formulas(transformer, call, mods)
    with fr.apply(transformer, mods):
        transformer.fuse_qkv_projections()
        assert all(m.fused_projections for m in attentions(transformer))
        fused = run(transformer, call)
        transformer.unfuse_qkv_projections()
        assert_same(run(transformer, call), expected)
    assert_same(fused, expected)


def test_half_precision_ids_are_exact_and_batched_ids_are_read(transformer):
    call, mods = build_call(), modulations()
    expected = by_formulas(transformer, call, mods)
    with fr.apply(transformer, mods):
        low = {name: call[name].to(torch.bfloat16) for name in ("txt_ids", "img_ids")}
        assert torch.equal(run(transformer, call | low), run(transformer, call))
        batched = {name: call[name][None].expand(2, -1, -1) for name in ("txt_ids", "img_ids")}
        assert_same(run(transformer, call | batched), expected)


def test_calls_of_different_length_alternate(transformer):
    """True CFG: two prompts, two text lengths, one handle."""
    layouts = [LAYOUT, fr.TokenLayout(TEXT + 3, TARGET, [REFERENCE])]
    calls = [build_call(layout) for layout in layouts]
    method = types.SimpleNamespace(modulations=lambda site: modulations(site.tokens))
    with fr.apply(transformer, method):
        outs = [run(transformer, call) for call in calls + calls]
    for n, layout in enumerate(layouts):
        expected = by_formulas(transformer, calls[n], modulations(layout))
        assert_same(outs[n], expected)
        assert torch.equal(outs[n], outs[n + 2])


def test_other_ids_of_the_same_shape_make_another_plan(transformer):
    call, mods = build_call(), modulations()
    far = call | {"img_ids": call["img_ids"] * torch.tensor([1.0, 3.0, 2.0])}
    with fr.apply(transformer, mods):
        for _ in range(2):
            assert_same(run(transformer, call), by_formulas_within(transformer, call, mods))
            assert_same(run(transformer, far), by_formulas_within(transformer, far, mods))


def by_formulas_within(model, call, mods):
    """The expectation while a handle is bound: on a copy of the weights."""
    twin = build_transformer(call["hidden_states"].shape[-1]).double()
    twin.load_state_dict(model.state_dict())
    return by_formulas(twin, call, mods)


def test_ids_and_modulations_changed_in_place_are_seen(transformer):
    call, mods = build_call(), modulations()
    with fr.apply(transformer, mods):
        run(transformer, call)
        call["img_ids"][:, 1] += call["img_ids"][:, 2]
        mods[1].weight.mul_(0.5)
        assert_same(run(transformer, call), by_formulas_within(transformer, call, mods))


def test_gradients_flow_to_the_inputs(transformer):
    call = build_call(batch=1)
    leaf = call["hidden_states"].requires_grad_()
    with fr.apply(transformer, modulations()):
        transformer(**call, return_dict=False)[0].square().sum().backward()
    assert bool(leaf.grad.isfinite().all())
    assert float(leaf.grad.abs().max()) > 0


# ---- nothing active --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "methods",
    [
        [],
        [Recorder()],
        [fr.BiasDelta(1.0, 1.0, keys=LAYOUT.references), fr.BandWeight(torch.ones(DIM // 2))],
    ],
    ids=["nothing", "silent method", "neutral"],
)
def test_nothing_active_is_the_stock_model_bit_for_bit(dtype, methods, monkeypatch):
    monkeypatch.setattr(fr, "attention", None)  # equal bits by way of the host's own processors, not by luck
    model = build_transformer(4).to(dtype)
    call = build_call(dtype=dtype)
    stock = run(model, call)
    with fr.apply(model, *methods):
        assert torch.equal(run(model, call), stock)
    assert torch.equal(run(model, call), stock)


@pytest.mark.parametrize("layers", [{0}, {1, 3}, {2, 3}])
def test_some_layers_only(transformer, layers):
    """Layers count double-stream blocks first; the others run the processor they had."""
    call, mods = build_call(), modulations()
    method = Recorder(mods, when=lambda site: site.layer in layers)
    with fr.apply(transformer, method):
        out = run(transformer, call)
    assert_same(out, by_formulas(transformer, call, mods, layers))
    assert_differ(out, by_formulas(transformer, call, mods, {0, 1, 2, 3} - layers))
    assert [site.layer for site in method.sites] == [0, 1, 2, 3]


def test_plans_are_shared_by_layers_and_steps(transformer, monkeypatch):
    built = []
    plan = fr.plan
    monkeypatch.setattr(fr, "plan", lambda **arguments: built.append(1) or plan(**arguments))
    call = build_call()
    method = types.SimpleNamespace(modulations=lambda site: modulations(site.tokens))  # new tensors at every site
    with fr.apply(transformer, method):
        for timestep in (1.0, 0.5, 0.25):
            ids = {name: call[name].clone() for name in ("txt_ids", "img_ids")}
            run(transformer, call | ids | {"timestep": torch.full((2,), timestep, dtype=torch.float64)})
    assert len(built) == 1


# ---- pipelines -------------------------------------------------------------------------------------------------------


def build_pipeline(kind=FluxKontextPipeline, dtype=torch.float32, scheduler_shift: float = 3.0):
    parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler_shift)
    vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    pipe = kind(transformer=build_transformer(4), scheduler=scheduler, vae=vae, **parts).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps: int = 3, batch: int = 2, negative: bool = False, **arguments):
    """An image of 3 x 5 tokens, from a reference of 2 x 3 tokens where the pipeline takes one."""
    g = torch.Generator().manual_seed(1)
    embeds = {
        "prompt_embeds": torch.randn(batch, TEXT, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=g),
    }
    if negative:
        embeds |= {f"negative_{name}": -value for name, value in embeds.items()} | {"true_cfg_scale": 2.0}
    embeds = {n: v.to(pipe.transformer.dtype) if isinstance(v, torch.Tensor) else v for n, v in embeds.items()}
    if isinstance(pipe, FluxKontextPipeline):
        arguments |= {"image": torch.rand(1, 3, 4, 6, generator=g), "max_area": 60, "_auto_resize": False}
    return pipe(
        **embeds, height=6, width=10, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(2), return_dict=False, **arguments,
    )[0]  # fmt: skip


@pytest.mark.parametrize("kind", [FluxPipeline, FluxKontextPipeline])
def test_pipeline_runs_modulated_and_comes_back(kind):
    pipe = build_pipeline(kind)
    layout = LAYOUT if kind is FluxKontextPipeline else fr.TokenLayout(TEXT, TARGET)
    keys = layout.references if layout.reference_grids else layout.text
    method = Recorder([fr.BiasDelta(1.0, 3.0, keys=keys)])
    stock = generate(pipe)
    with fr.apply(pipe, method):
        out = generate(pipe)
    assert {site.tokens for site in method.sites} == {layout}
    assert_differ(out, stock)
    assert torch.equal(generate(pipe), stock)


def test_sites_of_a_run():
    pipe = build_pipeline()
    method = Recorder()
    with fr.apply(pipe, method):
        generate(pipe, steps=3, negative=True)
    # Four layers, twice a step: the negative prompt is another call, not another step.
    assert [s.step for s in method.sites] == [0] * 8 + [1] * 8 + [2] * 8
    assert [s.layer for s in method.sites] == [0, 1, 2, 3] * 6
    assert {(s.num_steps, s.axes_dim, s.spatial_axes) for s in method.sites} == {(3, AXES, (1, 2))}
    assert method.sites[-1].progress == 1.0


def test_steps_do_not_depend_on_the_dtype_or_on_earlier_runs():
    """More steps than bfloat16 tells timesteps apart, after a run that was cut short."""
    pipe = build_pipeline(FluxPipeline, torch.bfloat16, scheduler_shift=100.0)
    method = Recorder()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with fr.apply(pipe, method):
        generate(pipe, steps=5, batch=1, callback_on_step_end=stop)
        assert [s.step for s in method.sites[::LAYERS]] == [0, 1]
        method.sites.clear()
        generate(pipe, steps=16, batch=1)
    assert len(set(pipe.scheduler.timesteps.to(torch.bfloat16).tolist())) < 16
    assert [s.step for s in method.sites[::LAYERS]] == list(range(16))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.float32, 3.0), (torch.bfloat16, 100.0)])
def test_a_pipeline_that_shares_the_transformer_gets_the_right_steps(dtype, shift):
    """The handle's pipeline is not the one that runs: steps come from the timestep's value."""
    pipe = build_pipeline(FluxPipeline, dtype, shift)
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    method = Recorder()
    with fr.apply(pipe, method):
        generate(other, steps=16, batch=1)
    assert [s.step for s in method.sites[::LAYERS]] == list(range(16))
    assert method.sites[0].num_steps == 16


def test_the_step_inside_the_loop_is_read_without_touching_a_tensor():
    from fastrope.bindings.diffusers.calls import find_step

    scheduler = types.SimpleNamespace(timesteps=torch.empty(9, device="meta"), step_index=None, begin_index=0)
    pipe = types.SimpleNamespace(scheduler=scheduler, _current_timestep=1.0)
    assert find_step(pipe, torch.empty(2, device="meta"), 1000.0) == (0, 9)
    scheduler.step_index = 4
    assert find_step(pipe, torch.empty(2, device="meta"), 1000.0) == (4, 9)
    assert find_step(types.SimpleNamespace(scheduler=None), torch.ones(2), 1000.0) is None


def test_methods_active_at_some_steps_only():
    pipe = build_pipeline()
    mods = [fr.BiasDelta(1.0, 3.0, keys=LAYOUT.references)]
    stock = generate(pipe)
    outs = {}
    for name, when in (("never", lambda s: s.step > 2), ("last", lambda s: s.step == 2), ("all", lambda s: True)):
        with fr.apply(pipe, Recorder(mods, when)):
            outs[name] = generate(pipe)
    assert torch.equal(outs["never"], stock)
    assert_differ(outs["last"], stock)
    assert_differ(outs["last"], outs["all"])


def test_a_bare_transformer_is_told_its_step(transformer):
    method = Recorder()
    with fr.apply(transformer, method) as handle:
        run(transformer, build_call())
        handle.set_step(7, 10)
        run(transformer, build_call())
        handle.set_step(None)
        run(transformer, build_call())
        with pytest.raises(ValueError, match=r"^step: expected"):
            handle.set_step(10, 10)
    assert [(s.step, s.num_steps) for s in method.sites[::LAYERS]] == [(0, 28), (7, 10), (0, 28)]


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(3, 5), (1, 4), (4, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("references", [[], [(3, 5)], [(1, 1)], [(2, 7), (2, 7)]])
def test_layouts_are_read_off_the_ids(transformer, target, references):
    layout = fr.TokenLayout(TEXT, target, references)
    method = Recorder()
    with fr.apply(transformer, method):
        run(transformer, build_call(layout, batch=1))
    assert {s.tokens for s in method.sites} == {layout}


def test_references_of_one_frame_are_told_apart(transformer):
    """Kontext gives every reference frame 1 when several are joined."""
    layout = fr.TokenLayout(TEXT, TARGET, [(2, 3), (4, 3)])
    call = build_call(layout, batch=1)
    call["img_ids"][:, 0].clamp_(max=1)
    method = Recorder()
    with fr.apply(transformer, method):
        run(transformer, call)
    assert {s.tokens for s in method.sites} == {layout}


@pytest.mark.parametrize("spoil", [lambda ids: ids.flip(0), lambda ids: (ids + 254).bfloat16().double()])
def test_ids_that_are_no_grids_are_refused_only_by_who_needs_the_layout(transformer, spoil):
    call = build_call()
    call["img_ids"] = spoil(call["img_ids"])
    with fr.apply(transformer, Recorder()), pytest.raises(ValueError, match=r"^img_ids: expected raster grids"):
        run(transformer, call)
    mods = modulations()
    with fr.apply(transformer, mods):
        out = run(transformer, call)
    assert_same(out, by_formulas(transformer, call, mods))


# ---- handles ---------------------------------------------------------------------------------------------------------


def attentions(model) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "set_processor")]


def test_remove_restores_the_same_objects(transformer):
    other = build_transformer(4)
    before, others = transformer.attn_processors, other.attn_processors
    keys = list(transformer.state_dict())
    handle = fr.apply(transformer, modulations())
    during = transformer.attn_processors
    assert all(during[name] is not p for name, p in before.items())
    assert not any("Added" in type(p).__name__ or isinstance(p, torch.nn.Module) for p in during.values())
    assert list(transformer.state_dict()) == keys
    assert all(other.attn_processors[name] is p for name, p in others.items())
    assert len(transformer._forward_pre_hooks) == 1
    handle.remove()
    assert not handle.bound
    assert all(transformer.attn_processors[name] is p for name, p in before.items())
    assert len(transformer._forward_pre_hooks) == 0


def test_leaving_the_block_removes_even_after_an_error(transformer):
    before = transformer.attn_processors
    with pytest.raises(RuntimeError, match=r"^stop$"), fr.apply(transformer, modulations()):
        raise RuntimeError("stop")
    assert all(transformer.attn_processors[name] is p for name, p in before.items())
    with fr.apply(transformer) as handle:
        handle.remove()  # leaving the block afterwards is no second removal


def test_removing_twice_is_refused(transformer):
    handle = fr.apply(transformer)
    handle.remove()
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle"):
        handle.remove()


def test_applying_twice_is_refused_and_changes_nothing(transformer):
    with fr.apply(transformer) as handle:
        during = transformer.attn_processors
        with pytest.raises(ValueError, match=r"no handle is bound to"):
            fr.apply(transformer, modulations())
        assert all(transformer.attn_processors[name] is p for name, p in during.items())
        assert len(transformer._forward_pre_hooks) == 1
        assert handle.bound
    fr.apply(transformer).remove()


def test_processors_replaced_meanwhile_are_left_alone(transformer):
    handle = fr.apply(transformer)
    mine = Formulas(torch.zeros(1, 3), [])
    attentions(transformer)[1].set_processor(mine)
    with pytest.warns(UserWarning, match=r"^1 attention processors were replaced"):
        handle.remove()
    assert attentions(transformer)[1].processor is mine


def test_attention_backend_reaches_the_original(transformer):
    original = attentions(transformer)[0].processor
    with fr.apply(transformer):
        attentions(transformer)[0].set_attention_backend("native")
        assert original._attention_backend == "native"
        assert attentions(transformer)[0].processor._attention_backend == "native"


def test_a_call_that_goes_round_the_hook_is_refused(transformer):
    with fr.apply(transformer), pytest.raises(ValueError, match=r"^transformer: expected a call of the object"):
        transformer.forward(**build_call())


def test_a_failed_call_leaves_no_plan_of_an_earlier_one(transformer):
    with fr.apply(transformer, modulations()):
        run(transformer, build_call())
        short = fr.TokenLayout(TEXT, TARGET)
        with pytest.raises(ValueError, match="QueryScale"):
            run(transformer, build_call(short))
        with pytest.raises(ValueError, match=r"went round"):
            transformer.forward(**build_call())


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_hosts_are_refused():
    for host, name in (
        (torch.nn.Linear(2, 2), "Linear"),
        (types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)), "Linear"),
        (types.SimpleNamespace(unet=torch.nn.Linear(2, 2)), "SimpleNamespace"),
        ("FLUX.1-dev", "str"),
    ):
        with pytest.raises(ValueError, match=rf"^pipe: expected .*, received {name}$"):
            fr.apply(host)


@pytest.mark.parametrize("method", [3, "grag", fr.BiasDelta, types.SimpleNamespace(modulations=None)])
def test_what_is_no_method_is_refused(transformer, method):
    with pytest.raises(ValueError, match=r"^methods: expected modulations"):
        fr.apply(transformer, [method])


def test_a_method_must_answer_with_modulations(transformer):
    for answer in (None, fr.BiasDelta(), [1]):
        method = types.SimpleNamespace(modulations=lambda site, answer=answer: answer)
        with fr.apply(transformer, method), pytest.raises(ValueError, match=r"expected a list of modulations"):
            run(transformer, build_call())


def test_unknown_backends_are_refused(transformer):
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        fr.apply(transformer, backend="flash")


def test_ip_adapters_are_refused(transformer):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    attentions(transformer)[1].set_processor(FluxIPAdapterAttnProcessor(32, 32))
    with pytest.raises(NotImplementedError, match=r"^IP-Adapter: .*transformer_blocks\.1\.attn"):
        fr.apply(transformer)
    assert type(attentions(transformer)[0].processor).__name__ == "FluxAttnProcessor"
    assert not transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "what"), [("PAGFluxAttnProcessor", "PAG"), ("MyProcessor", "custom attention processors")]
)
def test_foreign_processors_are_refused(transformer, name, what):
    attentions(transformer)[0].set_processor(type(name, (), {})())
    with pytest.raises(NotImplementedError, match=rf"^{what}: expected FluxAttnProcessor at .*, received {name}$"):
        fr.apply(transformer)


def test_pag_pipelines_are_refused(transformer):
    mixin = type("PAGMixin", (), {})
    pipe = type("FluxPAGPipeline", (mixin,), {"transformer": transformer})()
    with pytest.raises(NotImplementedError, match=r"^PAG: "):
        fr.apply(pipe)


def test_nunchaku_is_refused(transformer):
    kind = type("NunchakuFluxTransformer2DModelV2", (FluxTransformer2DModel,), {"__module__": "nunchaku.models"})
    transformer.__class__ = kind
    with pytest.raises(NotImplementedError, match=r"^nunchaku: "):
        fr.apply(transformer)


def test_context_parallelism_is_refused_before_and_after(transformer):
    config = types.SimpleNamespace(context_parallel_config=object())
    processor = attentions(transformer)[0].processor
    processor._parallel_config = config
    with pytest.raises(NotImplementedError, match=r"^context parallelism: "):
        fr.apply(transformer)
    processor._parallel_config = None
    transformer._parallel_config = config
    with pytest.raises(NotImplementedError, match=r"^context parallelism: "):
        fr.apply(transformer)
    transformer._parallel_config = types.SimpleNamespace(context_parallel_config=None)  # tensor parallelism
    with fr.apply(transformer), pytest.raises(NotImplementedError, match=r"^context parallelism: "):
        attentions(transformer)[0].processor._parallel_config = config


def test_attention_masks_are_refused_where_a_modulation_is_active(transformer):
    call = build_call() | {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 1, 1, len(LAYOUT)).bool()}}
    with fr.apply(transformer):
        run(transformer, call)
    with fr.apply(transformer, modulations()), pytest.raises(NotImplementedError, match=r"^attention_mask: "):
        run(transformer, call)


# ---- compilers -------------------------------------------------------------------------------------------------------


def compiled(model, how: str, counter):
    """What to bind to and to call."""
    if how == "wrapped":
        return torch.compile(model, backend=counter, fullgraph=True)
    if how == "in place":
        model.compile(backend=counter, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place", "block by block"])
def test_compiles_once_for_all_steps(transformer, how):
    """No graph break, and no new graph when the plan of another step holds other numbers."""
    from torch._dynamo.testing import CompileCounter

    call = build_call()
    weights = [torch.full((DIM // 2,), 0.5 + n / 10) for n in range(3)]
    method = types.SimpleNamespace(
        modulations=lambda site: [fr.BandWeight(weights[site.step], keys=site.tokens.references)] * (site.layer > 0)
    )
    expected = [
        by_formulas(transformer, call, [fr.BandWeight(w, keys=LAYOUT.references)], range(1, LAYERS)) for w in weights
    ]
    torch._dynamo.reset()
    counter = CompileCounter()
    model = compiled(transformer, how, counter)
    counts = []
    with fr.apply(model, method) as handle:
        for step in range(3):
            handle.set_step(step, 3)
            assert_same(run(model, call), expected[step])
            counts.append(counter.frame_count)
    assert counts[0] >= 1
    assert counts == counts[:1] * 3


def test_compiled_after_apply(transformer):
    call, mods = build_call(), modulations()
    torch._dynamo.reset()
    with fr.apply(transformer, mods):
        expected = run(transformer, call)
        assert_same(run(torch.compile(transformer, backend="eager", fullgraph=True), call), expected)


def test_the_hosts_own_embedding_decides(transformer, monkeypatch):
    """Another theta is read off the model; an embedding that is not diffusers' own is refused."""
    call = build_call()
    barely = fr.BiasDelta(1.0, 1 + 1e-9, keys=slice(0, 4))
    transformer.pos_embed.theta = 20
    stock = run(transformer, call)
    with fr.apply(transformer, barely):
        torch.testing.assert_close(run(transformer, call), stock, rtol=1e-6, atol=1e-6)
    own = type(transformer.pos_embed).forward
    monkeypatch.setattr(transformer.pos_embed, "forward", lambda ids: own(transformer.pos_embed, ids / 2))
    with fr.apply(transformer, barely), pytest.raises(NotImplementedError, match="rotary embedding"):
        run(transformer, call)
