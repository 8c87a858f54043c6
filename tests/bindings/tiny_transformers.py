"""The transformers of every host with random weights, small enough for a CPU, and arguments to call them with."""

from __future__ import annotations

import logging
import math

import diffusers
import torch

import fastrope as fr

TEXT = 5
TARGET, REFERENCES = (3, 5), [(2, 3), (4, 3)]
WIDTH = 32  # of text embeddings
HEADS, DIM = 2, 16

for name in ("diffusers", "transformers"):  # advice on missing encoders
    logging.getLogger(name).setLevel(logging.ERROR)


def positions_of(layout: fr.TokenLayout, convention: str) -> torch.Tensor:
    """``(S, axes)``. LongCat and Ovis count text on the diagonal, LongCat its pictures from frame 1 on."""
    if convention not in ("longcat", "ovis"):
        return layout.positions(convention)
    positions = layout.positions("flux")
    positions[layout.text, 1:] = torch.arange(layout.text_tokens)[:, None]
    if convention == "longcat":
        positions[layout.text_tokens :] += torch.tensor([1, layout.text_tokens, layout.text_tokens])
    return positions


def lively(model):
    """The stock initialisation is so small that attention hardly shows in the output."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / math.sqrt(weight[0].numel()))
            elif name.endswith((".norm_q.weight", ".norm_k.weight", ".norm_added_q.weight", ".norm_added_k.weight")):
                weight.fill_(1.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def run(model, call: dict) -> torch.Tensor:
    """The transformer's output, pictures of a list stacked."""
    with torch.no_grad():
        out = model(**call, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


# ---- FLUX.1 and its kin ----------------------------------------------------------------------------------------------

BLOCKS = dict(num_layers=2, num_single_layers=2, attention_head_dim=DIM, num_attention_heads=HEADS,
              joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8))  # fmt: skip


def build_flux(layers=(2, 2)):
    blocks = BLOCKS | dict(zip(("num_layers", "num_single_layers"), layers, strict=True))
    return lively(diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, pooled_projection_dim=WIDTH, **blocks))


def build_chroma():
    return lively(
        diffusers.ChromaTransformer2DModel(
            patch_size=1, in_channels=4, approximator_num_channels=8, approximator_hidden_dim=16,
            approximator_layers=2, **BLOCKS,
        )
    )  # fmt: skip


def build_longcat():
    return lively(
        diffusers.LongCatImageTransformer2DModel(patch_size=1, in_channels=4, pooled_projection_dim=WIDTH, **BLOCKS)
    )


def build_ovis():
    return lively(diffusers.OvisImageTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, **BLOCKS))


def ids_call(convention: str, *, pooled: bool = False, guidance: bool = False, channels: int = 4):
    """Calls of transformers that take position ids."""

    def call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64) -> dict:
        # LongCat's pipelines keep the ids in single precision, the others hand them over in that of the model.
        ids = positions_of(layout, convention).to(torch.float32 if convention == "longcat" else dtype)
        arguments = {
            "hidden_states": torch.randn(batch, len(layout) - layout.text_tokens, channels, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, layout.text_tokens, WIDTH, dtype=dtype),
            "timestep": torch.full((batch,), 0.5, dtype=dtype),
            "txt_ids": ids[layout.text],
            "img_ids": ids[layout.text_tokens :],
        }
        if pooled:
            arguments["pooled_projections"] = torch.randn(batch, WIDTH, dtype=dtype)
        if guidance:
            arguments["guidance"] = torch.full((batch,), 2.5, dtype=dtype)
        return arguments

    return call


# ---- FLUX.2 ----------------------------------------------------------------------------------------------------------


def build_flux2():
    blocks = BLOCKS | {"axes_dims_rope": (4, 4, 4, 4)}
    return lively(
        diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=4, timestep_guidance_channels=32, mlp_ratio=2.0, rope_theta=2000, **blocks
        )
    )


# ---- Qwen-Image ------------------------------------------------------------------------------------------------------


def build_qwen(layers: int = 3):
    return lively(
        diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=1, num_layers=layers, attention_head_dim=DIM,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def qwen_call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64) -> dict:
    grids = (layout.target_grid, *layout.reference_grids)
    return {
        "hidden_states": torch.randn(batch, len(layout) - layout.text_tokens, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, layout.text_tokens, WIDTH, dtype=dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "img_shapes": [[(1, *grid) for grid in grids]] * batch,
    }


# ---- Z-Image ---------------------------------------------------------------------------------------------------------


def build_z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=2, dim=HEADS * DIM, n_layers=3, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
        cap_feat_dim=WIDTH, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )  # fmt: skip
    model = lively(model)
    with torch.no_grad():
        for refiner in (*model.noise_refiner, *model.context_refiner, *model.layers):
            refiner.attention_norm2.weight.fill_(0.5)
    return model


def z_image_call(layout: fr.TokenLayout, batch: int = 2, dtype=torch.float64, captions=None) -> dict:
    rows, columns = layout.target_grid
    captions = captions or [layout.text_tokens] * batch
    return {
        "x": [torch.randn(2, 1, 2 * rows, 2 * columns, dtype=dtype) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, dtype=dtype),
        "cap_feats": [torch.randn(length, WIDTH, dtype=dtype) for length in captions],
    }
