"""ComfyUI as far as the binding touches it, small enough for CI: a model patcher, the wrappers around a model's call,
one transformer of Flux's shape and a sampler.

The signatures are held to ``comfyui_interface.json``, which ``test_comfyui_real.py`` compares with the real ones.
"""

from __future__ import annotations

import inspect
import types
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrope.bindings.comfyui.marks import Carried

# ---- comfy.patcher_extension, comfy.model_patcher -------------------------------------------------------------------


class WrapperExecutor:
    """Calls wrappers one within another, the original last."""

    def __init__(self, original, class_obj, wrappers, idx=0):
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, list(wrappers), idx

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        """From outside."""
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)


class ModelPatcher:
    """Options around a model that clones share."""

    def __init__(self, model, load_device=None, offload_device=None):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks = {}, {}

    def clone(self):
        """With lists and dicts of its own."""
        made = ModelPatcher(self.model)
        for name in ("model_options", "wrappers", "callbacks"):
            setattr(made, name, _copied(getattr(self, name)))
        return made

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type, key):
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def get_wrappers(self, wrapper_type, key):
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def add_callback_with_key(self, call_type, key, callback):
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type, key):
        self.callbacks.get(call_type, {}).pop(key, None)

    def set_model_attn1_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), patch]


def _copied(x):
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return list(x) if isinstance(x, list) else x


# ---- comfy.ldm.modules.attention, comfy.ldm.flux --------------------------------------------------------------------


def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """Plain attention, or the override."""
    options = kwargs.get("transformer_options") or {}
    if "_inside_attn_wrapper" not in kwargs and "optimized_attention_override" in options:
        kwargs["_inside_attn_wrapper"] = True
        return options["optimized_attention_override"](
            optimized_attention, q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape, **kwargs,
        )  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class EmbedND(nn.Module):
    """Positions ``(B, S, axes)`` to rotations ``(B, 1, S, D/2, 2, 2)``."""

    def __init__(self, dim, theta, axes_dim):
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.cat([
            ids[..., n, None].double() * self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for n, dim in enumerate(self.axes_dim)
        ], dim=-1)  # fmt: skip
        rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
        return rows.unflatten(-1, (2, 2)).float()[:, None]


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, pe, text, options):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(y, y.shape[-1:]) for y in (q, k))
        extra = {**options, "img_slice": [text, q.shape[2]]}
        mask = None
        for patch in options.get("patches", {}).get("attn1_patch", []):
            out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
            q, k, v = (out.get(name, y) for name, y in zip("qkv", (q, k, v), strict=True))
            pe, mask = out.get("pe", pe), out.get("attn_mask", mask)
        if pe is not None:
            q, k = (_rotated(y, pe) for y in (q, k))
        return x + self.out(
            optimized_attention(q, k, v, self.heads, mask, skip_reshape=True, transformer_options=options)
        )


def _rotated(x: Tensor, pe: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2)).float()
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


class Flux(nn.Module):
    """Two double and two single blocks, all of them the same here."""

    def __init__(self, axes_dim=(4, 6, 6), heads: int = 2, channels: int = 4):
        super().__init__()
        self.patch_size, dim = 2, heads * sum(axes_dim)
        self.params = types.SimpleNamespace(
            axes_dim=list(axes_dim), txt_ids_dims=[], default_ref_method="offset", ref_index_scale=1.0
        )
        self.pe_embedder = EmbedND(sum(axes_dim), 10000, list(axes_dim))
        self.img_in, self.txt_in = nn.Linear(channels * 4, dim), nn.Linear(12, dim)
        self.double_blocks = nn.ModuleList(_Block(dim, heads) for _ in range(2))
        self.single_blocks = nn.ModuleList(_Block(dim, heads) for _ in range(2))
        self.final_layer = nn.Linear(dim, channels * 4)

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        """Velocity of a latent ``(B, C, H, W)``; every reference stands at index 1."""
        options = transformer_options.copy()
        images = [x, *(each.expand(len(x), -1, -1, -1) for each in ref_latents or ())]
        tokens, ids = zip(*(self._patched(image, min(n, 1)) for n, image in enumerate(images)), strict=True)
        if ref_latents:
            options["reference_image_num_tokens"] = [each.shape[1] for each in tokens[1:]]
        text = context.shape[1]
        h = torch.cat([self.txt_in(context), *map(self.img_in, tokens)], dim=1) * (1 + timestep[:, None, None])
        pe = self.pe_embedder(torch.cat([torch.zeros(1, text, 3), *ids], dim=1))
        for name, kind in (("double_blocks", "double"), ("single_blocks", "single")):
            options["block_type"] = kind
            for n, block in enumerate(getattr(self, name)):
                options["block_index"] = n
                h = block(h, pe, text, options)
        out = self.final_layer(h[:, text : text + tokens[0].shape[1]])
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        return (
            out.unflatten(1, (rows, columns))
            .unflatten(-1, (-1, 2, 2))
            .permute(0, 3, 1, 4, 2, 5)
            .flatten(2, 3)
            .flatten(3)
        )

    def _patched(self, image: Tensor, index: int):
        tokens = F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
        rows, columns = image.shape[-2] // 2, image.shape[-1] // 2
        ids = torch.zeros(rows, columns, 3)
        ids[..., 0], ids[..., 1], ids[..., 2] = index, torch.arange(rows)[:, None], torch.arange(columns)
        return tokens, ids.flatten(0, 1)[None]


# ---- comfy.model_base, comfy.samplers --------------------------------------------------------------------------------


def _noise_scaling(sigma, noise, latent_image, max_denoise=False):
    return sigma * noise + (1 - sigma) * latent_image


class _Condition:
    """A condition, and how it is made to fit a batch."""

    def __init__(self, cond):
        self.cond = cond

    def process_cond(self, batch_size, **kwargs):
        return _Condition(self.cond.expand(batch_size, *self.cond.shape[1:]))


class BaseModel(nn.Module):
    """What a sampler calls."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.current_patcher = None
        self.model_sampling = types.SimpleNamespace(noise_scaling=_noise_scaling)

    def process_latent_in(self, latent):
        return 0.5 * latent

    def extra_conds(self, **kwargs):
        """Conditions by the names of the transformer's arguments."""
        return {"c_crossattn": _Condition(kwargs["cross_attn"])}

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """Through the wrappers of the options."""
        wrappers = [w for some in transformer_options.get("wrappers", {}).get("apply_model", {}).values() for w in some]
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        out = self.diffusion_model(
            x, t, context=c_crossattn, control=control, transformer_options=transformer_options, **kwargs
        )
        return x - t[:, None, None, None] * out


MODEL = type("Flux", (BaseModel,), {})  # by the name that the binding knows


def tiny(seed: int = 0, model=MODEL, **options) -> ModelPatcher:
    """A patcher around random weights."""
    torch.manual_seed(seed)
    return ModelPatcher(model(Flux(**options)).requires_grad_(False))


def prompt(tokens: int = 5, seed: int = 1, references=()):
    """What a conditioning becomes."""
    text = torch.randn(1, tokens, 12, generator=torch.Generator().manual_seed(seed))
    return {"c_crossattn": text, **({"ref_latents": list(references)} if references else {})}


def conditioning(tokens: int = 5, seed: int = 1, references=(), **options) -> list:
    """What an encoder of text gives, with options that nodes have set."""
    options = {"pooled_output": None, **options, **({"reference_latents": list(references)} if references else {})}
    return [[prompt(tokens, seed)["c_crossattn"], options]]


def become(given: list):
    """What the sampler makes of a conditioning of one part."""
    ((text, options),) = given
    latents = [0.5 * x for x in options.get("reference_latents", ())]
    return {"c_crossattn": text, **({"ref_latents": latents} if latents else {}), "conds": options["model_conds"]}


def picture(height: int = 8, width: int = 12, seed: int = 2, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def sample(
    patcher: ModelPatcher, positive, negative=None, steps: int = 3, cfg: float = 2.0, x=None, midway: bool = False
) -> Tensor:
    """Euler, both branches in one batch where they go together; ``midway`` asks between two levels, too."""
    for callback in patcher.callbacks.get("on_pre_run", {}).get("fastrope", []):
        callback(patcher)
    conds = {"positive": [positive], "negative": [negative]}
    conds = {name: [{"model_conds": c.get("conds", {})} for c in some if c] for name, some in conds.items()}
    _within(patcher, "prepare_sampling", _prepare_sampling).execute(patcher, None, conds)
    x = picture() if x is None else x
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas):
        denoised = _denoised(patcher, x, sigma, sigmas, positive, negative, cfg)
        if midway:
            middle = torch.lerp(denoised, x, (sigma + following) / 2 / sigma)
            denoised = _denoised(patcher, middle, (sigma + following) / 2, sigmas, positive, negative, cfg)
        x = torch.lerp(denoised, x, following / sigma)
    for callback in patcher.callbacks.get("on_cleanup", {}).get("fastrope", []):
        callback(patcher)
    return x


def _prepare_sampling(model, noise_shape, conds, model_options=None, force_full_load=False, force_offload=False):
    pass


def _within(patcher, place: str, original, class_obj=None) -> WrapperExecutor:
    wrappers = [w for some in patcher.wrappers.get(place, {}).values() for w in some]
    return WrapperExecutor(original, class_obj, wrappers)


def _denoised(patcher, x, sigma, sigmas, positive, negative, cfg):
    rows = [(0, positive)] if negative is None else [(0, positive), (1, negative)]
    alike = len({(c["c_crossattn"].shape, *(y.shape for y in c.get("ref_latents", ()))) for _, c in rows}) == 1
    alike = alike and not any("conds" in c for _, c in rows)
    outs = {}
    for group in [rows] if alike else [[row] for row in rows]:
        options = _copied(patcher.model_options["transformer_options"])
        options["wrappers"] = _copied(patcher.wrappers)
        options |= {"cond_or_uncond": [n for n, _ in group], "sigmas": sigma.reshape(1), "sample_sigmas": sigmas}
        given = {"c_crossattn": torch.cat([c["c_crossattn"].expand(len(x), -1, -1) for _, c in group])}
        if "ref_latents" in group[0][1]:
            given["ref_latents"] = [
                torch.cat([y.expand(len(x), -1, -1, -1) for y in some])
                for some in zip(*(c["ref_latents"] for _, c in group), strict=True)
            ]
        given |= {
            name: each.process_cond(batch_size=len(x)).cond for name, each in group[0][1].get("conds", {}).items()
        }
        order = x.repeat(len(group), 1, 1, 1), sigma.expand(len(group) * len(x)), None, given.pop("c_crossattn"), None
        out = patcher.model.apply_model(*order, options, **given)
        outs |= dict(zip((n for n, _ in group), out.chunk(len(group)), strict=True))
    return outs[0] if negative is None else outs[1] + cfg * (outs[0] - outs[1])


def signature(function) -> list[str]:
    """Names of parameters."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


DOUBLED = {  # the real name, and what stands for it
    "comfy.model_base.BaseModel.apply_model": BaseModel.apply_model,
    "comfy.model_base.BaseModel.process_latent_in": BaseModel.process_latent_in,
    "comfy.model_base.BaseModel.extra_conds": BaseModel.extra_conds,
    "comfy.model_sampling.CONST.noise_scaling": _noise_scaling,
    "comfy.conds.CONDRegular.process_cond": _Condition.process_cond,
    **{
        f"comfy.conds.CONDConstant.{name}": getattr(Carried, name)
        for name in ("process_cond", "can_concat", "concat", "size")
    },
    "comfy.sampler_helpers.prepare_sampling": _prepare_sampling,
    "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": ModelPatcher.add_wrapper_with_key,
    "comfy.model_patcher.ModelPatcher.remove_wrappers_with_key": ModelPatcher.remove_wrappers_with_key,
    "comfy.model_patcher.ModelPatcher.get_wrappers": ModelPatcher.get_wrappers,
    "comfy.model_patcher.ModelPatcher.add_callback_with_key": ModelPatcher.add_callback_with_key,
    "comfy.model_patcher.ModelPatcher.remove_callbacks_with_key": ModelPatcher.remove_callbacks_with_key,
    "comfy.model_patcher.ModelPatcher.set_model_attn1_patch": ModelPatcher.set_model_attn1_patch,
    "comfy.ldm.modules.attention.attention_pytorch": optimized_attention,
    "comfy.ldm.flux.layers.EmbedND.__init__": EmbedND.__init__,
    "comfy.ldm.flux.model.Flux.forward": Flux.forward,
}
