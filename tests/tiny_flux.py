"""All the parts of a FLUX.1 pipeline with random weights: text encoders, tokenizers, a VAE that encodes."""

from __future__ import annotations

import torch


def parts() -> dict:
    """Components of ``FluxPipeline`` and ``FluxKontextPipeline``; a pixel per latent, four words."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    with torch.no_grad():  # as they are initialised, weights draw nothing that attention could change
        for weight in transformer.parameters():
            weight.normal_(std=0.3)
    vae = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=2, projection_dim=32,
    )  # fmt: skip
    t5 = T5Config(vocab_size=8, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, "transformer": transformer,
        "text_encoder": CLIPTextModel(clip), "tokenizer": word_tokenizer(77),
        "text_encoder_2": T5EncoderModel(t5), "tokenizer_2": word_tokenizer(512),
    }  # fmt: skip


def word_tokenizer(length: int):
    """Knows "make every night"; sequences of ``length`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "make": 3, "every": 4, "night": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=length
    )
