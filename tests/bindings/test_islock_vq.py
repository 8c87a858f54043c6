"""LlamaGen's VQ tokenizer: published names and shapes, nearest codes, round trips."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastrope.bindings.llamagen import VQConfig, VQTokenizer

TINY = VQConfig(codes=40, code_dim=4, multipliers=(1, 2, 2), channels=32, latent=16, blocks=1)


def conv(name, out, into, kernel):
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def block(name, into, out):
    shapes = {
        **norm(f"{name}.norm1", into), **conv(f"{name}.conv1", out, into, 3),
        **norm(f"{name}.norm2", out), **conv(f"{name}.conv2", out, out, 3),
    }  # fmt: skip
    return {**shapes, **(conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})}


def attention(name, channels):
    shapes = norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes.update(conv(f"{name}.{part}", channels, channels, 1))
    return shapes


def published_vq16():
    """Names and shapes of ``vq_ds16_t2i.pt`` and ``vq_ds16_c2i.pt``."""
    shapes = {
        "quantize.embedding.weight": (16384, 8),
        **conv("quant_conv", 8, 256, 1),
        **conv("post_quant_conv", 256, 8, 1),
    }
    encoder = [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    decoder = [(512, 512), (512, 256), (256, 256), (256, 128), (128, 128)]
    shapes.update(conv("encoder.conv_in", 128, 3, 3))
    shapes.update(conv("decoder.conv_in", 512, 256, 3))
    for side, levels, blocks, deepest, step in (
        ("encoder", encoder, 2, 4, "downsample"),
        ("decoder", decoder, 3, 0, "upsample"),
    ):
        for level, (into, out) in enumerate(levels):
            name = f"{side}.conv_blocks.{level}"
            for index in range(blocks):
                shapes.update(block(f"{name}.res.{index}", into if index == 0 else out, out))
                if level == deepest:
                    shapes.update(attention(f"{name}.attn.{index}", out))
            if level != 4:
                shapes.update(conv(f"{name}.{step}.conv", out, out, 3))
        shapes.update(block(f"{side}.mid.0", 512, 512))
        shapes.update(attention(f"{side}.mid.1", 512))
        shapes.update(block(f"{side}.mid.2", 512, 512))
    shapes.update({**norm("encoder.norm_out", 512), **conv("encoder.conv_out", 256, 512, 3)})
    shapes.update({**norm("decoder.norm_out", 128), **conv("decoder.conv_out", 3, 128, 3)})
    return shapes


def test_published_names_and_shapes():
    expected = published_vq16()
    with torch.device("meta"):
        state = VQTokenizer().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    weights = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    weights["quantize.codebook_used"] = torch.empty(65536, device="meta")
    assert VQTokenizer.from_checkpoint({"model": weights}).config.factor == 16


@pytest.fixture
def tokenizer():
    return VQTokenizer(TINY).eval()


def test_codes_are_the_nearest_entries(tokenizer):
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 2 * 3)
    assert len(codes.unique()) > 2
    with torch.no_grad():
        latents = F.normalize(tokenizer.quant_conv(tokenizer.encoder(pixels)), dim=1)
    entries = F.normalize(tokenizer.quantize.embedding.weight, dim=-1)
    for row in range(2):
        for index in range(6):
            latent = latents[row, :, index // 3, index % 3]
            assert int((entries - latent).square().sum(-1).argmin()) == int(codes[row, index])


def written_out(w, name, x):
    """An encoder or decoder in float64, operation by operation off the state dict ``w``."""

    def apply(layer, x, **options):
        return F.conv2d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], **options)

    def norm(layer, x):
        groups = x.unflatten(1, (32, -1))
        mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, correction=0)
        x = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return x * w[f"{layer}.weight"][:, None, None] + w[f"{layer}.bias"][:, None, None]

    def swish(x):
        return x / (1 + (-x).exp())

    def residual(layer, x):
        h = apply(f"{layer}.conv1", swish(norm(f"{layer}.norm1", x)), padding=1)
        h = apply(f"{layer}.conv2", swish(norm(f"{layer}.norm2", h)), padding=1)
        return h + (apply(f"{layer}.nin_shortcut", x) if f"{layer}.nin_shortcut.weight" in w else x)

    def attend(layer, x):
        h = norm(f"{layer}.norm", x)
        q, k, v = (apply(f"{layer}.{part}", h).flatten(2) for part in "qkv")
        h = v @ (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1).transpose(1, 2)
        return x + apply(f"{layer}.proj_out", h.view(x.shape))

    def middle(x):
        return residual(f"{name}.mid.2", attend(f"{name}.mid.1", residual(f"{name}.mid.0", x)))

    x = apply(f"{name}.conv_in", x, padding=1)
    x = middle(x) if name == "decoder" else x
    for level in range(3):
        layer = f"{name}.conv_blocks.{level}"
        for index in range(1 if name == "encoder" else 2):
            x = residual(f"{layer}.res.{index}", x)
            if f"{layer}.attn.{index}.q.weight" in w:
                x = attend(f"{layer}.attn.{index}", x)
        if f"{layer}.downsample.conv.weight" in w:
            rows = torch.cat([x, torch.zeros_like(x[:, :, :1])], 2)
            x = apply(f"{layer}.downsample.conv", torch.cat([rows, torch.zeros_like(rows[..., :1])], 3), stride=2)
        if f"{layer}.upsample.conv.weight" in w:
            x = apply(f"{layer}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    x = middle(x) if name == "encoder" else x
    return apply(f"{name}.conv_out", swish(norm(f"{name}.norm_out", x)), padding=1)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_both_halves_are_the_written_out_networks(tokenizer, name):
    with torch.no_grad():
        for tensor in tokenizer.parameters():  # norms that do nothing by default must do something
            tensor.add_(0.1 * torch.randn_like(tensor))
    weights = {key: tensor.double() for key, tensor in tokenizer.state_dict().items()}
    x = torch.randn(2, 3, 8, 12) if name == "encoder" else torch.randn(2, TINY.latent, 2, 3)
    with torch.no_grad():
        found = getattr(tokenizer, name)(x)
    torch.testing.assert_close(found.double(), written_out(weights, name, x.double()), atol=1e-4, rtol=1e-4)


def test_codes_decode_to_pixels_of_their_grid(tokenizer):
    codes = torch.randint(TINY.codes, (2, 6))
    pixels = tokenizer.decode(codes, (2, 3))
    assert pixels.shape == (2, 3, 8, 12)
    assert tokenizer.encode(pixels).shape == (2, 6)
    torch.testing.assert_close(tokenizer.decode(codes[:1], (2, 3)), pixels[:1], atol=1e-5, rtol=1e-5)
    other = codes.clone()
    other[0, 5] = (other[0, 5] + 1) % TINY.codes
    changed = (tokenizer.decode(other, (2, 3)) - pixels).abs().amax((1, 2, 3))
    assert changed[0] > 1e-3
    assert changed[1] < 1e-5


def test_attention_is_softmax_over_all_positions(tokenizer):
    layer = tokenizer.decoder.mid[1]
    x = torch.randn(1, 64, 2, 3)
    h = layer.norm(x)
    q, k, v = (part(h).flatten(2)[0] for part in (layer.q, layer.k, layer.v))
    mixed = v @ (q.T @ k / 64**0.5).softmax(-1).T
    expected = x + layer.proj_out(mixed.view(1, 64, 2, 3))
    torch.testing.assert_close(layer(x), expected)


def test_the_codebook_has_norm_one(tokenizer):
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(TINY.codes))


def test_a_checkpoint_brings_back_the_same_tokenizer(tmp_path, tokenizer):
    torch.save({"ema": tokenizer.state_dict()}, tmp_path / "vq.pt")
    loaded = VQTokenizer.from_checkpoint(tmp_path / "vq.pt", config=TINY)
    codes = torch.randint(TINY.codes, (1, 4))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    with pytest.raises(ValueError, match=r"weights: expected the names and shapes of a VQTokenizer"):
        VQTokenizer.from_checkpoint(tmp_path / "vq.pt")


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 1, 8, 8), (1, 3, 0, 8), (3, 8, 8)])
def test_pictures_that_do_not_fit_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match="pixels: expected"):
        tokenizer.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), "a floating dtype"),
        (torch.full((1, 3, 8, 8), 200.0), "values about -1..1: pixels / 127.5 - 1 for 8 bits"),
        (torch.full((1, 3, 8, 8), torch.inf), "finite values"),
    ],
)
def test_pictures_of_another_range_are_refused(tokenizer, pixels, message):
    with pytest.raises(ValueError, match=f"pixels: expected {message}"):
        tokenizer.encode(pixels)


def test_codes_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="codes: expected 2 x 2 = 4, received 5"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="codes: expected image tokens alone"):
        tokenizer.decode(torch.full((1, 4), TINY.codes))
    with pytest.raises(ValueError, match="channels: expected a multiple of 32"):
        VQConfig(channels=48)
