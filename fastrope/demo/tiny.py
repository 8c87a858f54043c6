"""A FLUX Kontext pipeline small enough for any machine: no download, a fixed seed, three attention layers.

Random weights everywhere would draw noise. So only what decides *where* attention looks stays random (the weights of
queries and keys), and the path of the values is set by hand: colours enter the residual stream, attention moves them
unchanged, and the output layer reads them back. The velocity is then ``own colour - attended colour``, and integrating
it paints, at every target token, the colours that its attention gathered from the reference.
"""

from __future__ import annotations

import contextlib
import logging

import torch

from ..extras import require_packages

AXES = (8, 28, 28)  # half of FLUX's axes, so the bands keep their proportions
HEADS = 2
CHANNELS = 12  # a packed latent: 2 x 2 pixels of 3 channels
JOINT = 32  # width of a text embedding
SHARPNESS = 6.0  # squared gain of the q and k norms; the largest logit is sqrt(head dim) times this
CONTENT = 0.6  # size of what depends on the token's content, against the common vector
FRAME = 1.6  # length of the pair that tells frames apart, against the longest of the others
BASE = 3.0  # size of the constant part of the residual stream, against the colours; it keeps layer norms near linear
NORM = (BASE**2 + 3) ** 0.5  # what a layer norm divides the residual stream by, about
LATER = 0.2  # strength of the layers after the first, which smooth the velocity
PACE = 2.5  # the velocity, against own colour - attended colour; at 1, e**-1 of the noise would stay


def pipeline(seed: int, device: torch.device, dtype: torch.dtype):
    """A ``FluxKontextPipeline`` without text encoders whose VAE is the identity: latents are pixels in -1..1.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
    """
    require_packages("diffusers", "transformers")
    import transformers  # noqa: F401  (sets its log level on import, which the next line must come after)

    with quiet():
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=sum(AXES),
            num_attention_heads=HEADS, joint_attention_dim=JOINT, pooled_projection_dim=JOINT, axes_dims_rope=AXES,
        ).eval()  # fmt: skip
        with torch.no_grad():
            _carry_colours(transformer)
            for module in transformer.modules():
                if hasattr(module, "to_q"):
                    _look_near(module)
    with quiet():
        pipe = FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=_identity_vae(), text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device=device, dtype=dtype)


def text_to_image(seed: int, device: torch.device, dtype: torch.dtype):
    """The same models behind a ``FluxPipeline``, which takes no picture.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
    """
    parts = pipeline(seed, device, dtype).components
    with quiet():
        from diffusers import FluxPipeline

        pipe = FluxPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextlib.contextmanager
def quiet():
    """Silence the hosts' advice on missing encoders and on sizes no trained model has."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _look_near(attention) -> None:
    """Give queries and keys a common vector (their biases), which RoPE turns into a preference for near tokens of the
    next frame: the reference."""
    query, key = [], []
    for _ in range(HEADS):
        q, k = _common_pair()
        query.append(q)
        key.append(k)
    for names, bias in ((("to_q", "add_q_proj"), query), (("to_k", "add_k_proj"), key)):
        for name in names:
            linear = getattr(attention, name, None)
            if linear is not None:
                linear.weight.mul_(CONTENT)
                linear.bias.copy_(torch.cat(bias))
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(attention, name, None)
        if norm is not None:
            norm.weight.fill_(SHARPNESS**0.5)


def _common_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Common vectors ``(D,)`` of query and key, interleaved pairs. On axis 0 the key is turned back by one frame."""
    band = torch.cat([torch.linspace(0, 1, dim // 2) for dim in AXES])
    length = 2.0 * torch.exp(-0.5 * ((band - 0.2) / 0.15) ** 2)
    length[: AXES[0] // 2] = 0
    length[0] = 2.0 * FRAME
    phase = 2 * torch.pi * torch.rand(len(band))
    turned = phase.clone()
    turned[0] -= 1.0
    return tuple(torch.stack([length * p.cos(), length * p.sin()], dim=-1).flatten() for p in (phase, turned))


def _carry_colours(transformer) -> None:
    """Set the value path by hand; see the head of this module."""
    dim = HEADS * sum(AXES)
    embed = torch.linalg.qr(torch.randn(dim, CHANNELS + 1))[0] * dim**0.5  # orthogonal directions, unit per channel
    colour, base = embed[:, :CHANNELS], BASE * embed[:, CHANNELS]
    transformer.x_embedder.weight.copy_(colour)
    transformer.x_embedder.bias.copy_(base)
    transformer.context_embedder.weight.mul_(0.1)
    transformer.context_embedder.bias.copy_(base)
    direction = embed[:, CHANNELS:] / embed[:, CHANNELS].norm()
    without_base = torch.eye(dim) - direction @ direction.T
    for block in transformer.transformer_blocks:
        _set_gates(block.norm1.linear, dim, attention=-NORM)
        _set_gates(block.norm1_context.linear, dim, attention=0.0)
        turn = torch.linalg.qr(torch.randn(dim, dim))[0] @ without_base
        _set_linear(block.attn.to_v, turn)
        _set_linear(block.attn.add_v_proj, turn)
        _set_linear(block.attn.to_out[0], turn.T)
    for block in transformer.single_transformer_blocks:
        _set_gates(block.norm.linear, dim, attention=LATER * NORM)
        turn = torch.linalg.qr(torch.randn(dim, dim))[0] @ without_base
        _set_linear(block.attn.to_v, turn)
        _set_linear(block.proj_out, torch.cat([turn.T, torch.zeros(dim, block.proj_out.in_features - dim)], dim=1))
    transformer.norm_out.linear.weight.zero_()
    transformer.norm_out.linear.bias.zero_()
    read = torch.linalg.pinv(torch.cat([embed, torch.ones(dim, 1)], 1))[:CHANNELS]
    _set_linear(transformer.proj_out, PACE * NORM * read)


def _set_linear(linear, weight: torch.Tensor) -> None:
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_()


def _set_gates(linear, dim: int, attention: float) -> None:
    """Adaptive layer norm: no shift, no scale, the attention gate at ``attention``, the feed-forward gate closed."""
    linear.weight.zero_()
    linear.bias.zero_()
    linear.bias[2 * dim : 3 * dim] = attention


def _identity_vae():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class IdentityVAE(ModelMixin, ConfigMixin):
        """Latents are pixels."""

        config_name = "config.json"

        @register_to_config
        def __init__(self, block_out_channels=(3,), latent_channels=3, scaling_factor=1.0, shift_factor=0.0) -> None:
            super().__init__()
            self.register_buffer("dtype_holder", torch.zeros(1))  # a model without tensors has no dtype to ask for

        def encode(self, pixels):
            return (pixels,)

        def decode(self, latents, return_dict=False):
            return (latents,)

    return IdentityVAE()
