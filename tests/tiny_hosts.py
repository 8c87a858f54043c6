"""Autoregressive image models of tiny random weights, saved as their hosts save the published ones."""

from __future__ import annotations

from pathlib import Path

import torch

LLAMAGEN_SIZE = (32, 2, 2)  # dim, layers, heads; for fastrope.bindings.llamagen.SIZES, where loading looks heads up


def letters(special: dict[str, str], **options):
    """A tokenizer of single letters, with named special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *special.values()]
    vocabulary = {name: index for index, name in enumerate([*names, *"abcdefghijklmnopqrstuvwxyz0123456789*: "])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special, **options,
    )  # fmt: skip


def save_janus(folder: Path) -> None:
    """A Janus of 4 x 4 tokens, 8 x 8 pixels, with its processor."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusImageProcessor, JanusProcessor

    text = dict(
        model_type="llama", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2, projection_dim=32,
        num_image_tokens=16, depth=1,
    )  # fmt: skip
    vq = dict(
        embed_dim=4, num_embeddings=40, latent_channels=16, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, projection_dim=32, num_hidden_layers=1, image_token_embed_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=4)
    model = JanusForConditionalGeneration(config)
    # Saved with boi_token_id in it, loaded without: the file says that it comes from the model's configuration.
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    model.save_pretrained(folder)
    tokenizer = letters(dict(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>"), padding_side="left")
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}: "
    processor = JanusProcessor(JanusImageProcessor(), tokenizer, chat_template=template, num_image_tokens=16)
    processor.save_pretrained(folder)


def save_emu3(folder: Path) -> None:
    """An Emu3 of 8 x 8 pixels per token, with its processor; image tokens have the ids 60 to 91."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor

    special = dict(
        image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", image_wrapper_token="<wrap>", eof_token="<eof>"
    )
    codes = 32
    visual = {f"<|visual token {code:06d}|>": 60 + code for code in range(codes)}
    text = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attention_dropout=0.0,
    )  # fmt: skip
    vq = dict(
        codebook_size=codes, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1, attn_resolutions=[3], hidden_size=32, temporal_downsample_factor=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map={**visual, "<|extra_200|>": 94, "<image>": 4})
    Emu3ForConditionalGeneration(config).save_pretrained(folder)
    Emu3Processor(Emu3ImageProcessor(), letters(special)).save_pretrained(folder)


def save_llamagen(model: Path, tokenizer: Path, encoder: Path) -> dict:
    """A text-conditional LlamaGen and VQ-16 as checkpoint files, a T5 encoder as a folder; the model's shapes."""
    from transformers import T5Config, T5EncoderModel

    from fastrope.bindings import llamagen

    torch.manual_seed(0)
    dim, layers, heads = LLAMAGEN_SIZE
    shapes = dict(dim=dim, layers=layers, heads=heads, prefix=120, caption_dim=12, hidden=48, vocabulary=16384)
    torch.save({"model": llamagen.LlamaGen(llamagen.LlamaGenConfig(**shapes)).state_dict()}, model)
    torch.save({"model": llamagen.VQTokenizer().state_dict()}, tokenizer)
    T5EncoderModel(T5Config(vocab_size=60, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        encoder
    )
    letters({}).save_pretrained(encoder)
    return shapes
