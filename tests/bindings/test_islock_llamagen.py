"""LlamaGen: published names and shapes, its arithmetic, its cache, and editing with anchors; tiny and random."""

from __future__ import annotations

import argparse
import math
import pickle
import subprocess

import pytest
import torch
from tiny_llamagen import TINY
from torch.nn import functional as F

from fastrope.bindings import llamagen
from fastrope.bindings.llamagen.model import rotate, rotation_table

# dim, layers, feed-forward width of the published checkpoints.
PUBLISHED = {
    "B": (768, 12, 2048), "L": (1024, 24, 2816), "XL": (1280, 36, 3584), "XXL": (1536, 48, 4096),
    "3B": (3200, 24, 8704),
}  # fmt: skip


def published_shapes(size: str, condition: str) -> dict[str, tuple[int, ...]]:
    dim, layers, hidden = PUBLISHED[size]
    shapes = {"tok_embeddings.weight": (16384, dim), "norm.weight": (dim,), "output.weight": (16384, dim)}
    if condition == "text":
        shapes["cls_embedding.uncond_embedding"] = (120, 2048)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (dim, 2048)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (dim, dim)
    else:
        shapes["cls_embedding.embedding_table.weight"] = (1001, dim)
    for n in range(layers):
        shapes[f"layers.{n}.attention.wqkv.weight"] = (3 * dim, dim)
        shapes[f"layers.{n}.attention.wo.weight"] = (dim, dim)
        shapes[f"layers.{n}.feed_forward.w1.weight"] = (hidden, dim)
        shapes[f"layers.{n}.feed_forward.w3.weight"] = (hidden, dim)
        shapes[f"layers.{n}.feed_forward.w2.weight"] = (dim, hidden)
        shapes[f"layers.{n}.attention_norm.weight"] = (dim,)
        shapes[f"layers.{n}.ffn_norm.weight"] = (dim,)
    return shapes


@pytest.fixture
def model() -> llamagen.LlamaGen:
    model = llamagen.LlamaGen(TINY).eval()
    with torch.no_grad():
        model.output.weight.mul_(4.0)  # enough contrast for guidance and top-k to matter
    return model


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, TINY.prefix, TINY.caption_dim)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["text", "class"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_names_and_shapes(size, condition):
    shapes = published_shapes(size, condition)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = llamagen.LlamaGenConfig.of_weights(weights, grid=24)
    assert config == llamagen.LlamaGenConfig.published(size, grid=24, condition=condition)
    assert config.heads == {"B": 12, "L": 16, "XL": 20, "XXL": 24, "3B": 32}[size]
    with torch.device("meta"):
        state = llamagen.LlamaGen(llamagen.LlamaGenConfig.published(size, 24, condition)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    model = llamagen.LlamaGen.from_checkpoint({"model": weights}, grid=24)
    assert model.config.num_tokens == 576


@pytest.mark.parametrize("container", ["model", "module", "state_dict", "ema", None])
def test_a_checkpoint_brings_back_the_same_model(tmp_path, model, features, container):
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["freqs_cis"] = torch.zeros(3)
    content = state if container is None else {container: state, "args": argparse.Namespace(lr=1), "steps": 3}
    torch.save(content, tmp_path / "model.pt")
    loaded = llamagen.LlamaGen.from_checkpoint(tmp_path / "model.pt", grid=TINY.grid, heads=TINY.heads)
    assert (loaded.config.prefix, loaded.config.caption_dim, loaded.config.key_heads) == (5, 12, 2)
    tokens = torch.randint(TINY.vocabulary, (2, 6))
    assert torch.equal(loaded(tokens, features), model(tokens, features))


def test_weights_that_do_not_fit_are_listed(model):
    state = dict(model.state_dict())
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"weights: .*no norm\.weight; unknown extra"):
        llamagen.LlamaGen.from_checkpoint(state, grid=4, heads=2)
    state = {**model.state_dict(), "output.weight": torch.zeros(3, 32)}
    with pytest.raises(ValueError, match=r"output\.weight \(3, 32\) instead of \(48, 32\)"):
        llamagen.LlamaGen.from_checkpoint(state, grid=4, heads=2)
    with pytest.raises(ValueError, match="heads: expected"):
        llamagen.LlamaGen.from_checkpoint(model.state_dict(), grid=4)
    with pytest.raises(ValueError, match="checkpoint: expected a state dict"):
        llamagen.read_checkpoint({"model": {"a": 1}})
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        llamagen.read_checkpoint("absent.pt")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(subprocess.Popen, 2)], ids=["empty", "text", "code"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    for name in ("model.pt", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"checkpoint: expected a file of tensors, received .*{name}"):
            llamagen.read_checkpoint(path)


def test_safetensors_are_read(tmp_path, model, features):
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = llamagen.LlamaGen.from_checkpoint(tmp_path / "model.safetensors", grid=4, heads=2)
    tokens = torch.randint(TINY.vocabulary, (2, 3))
    assert torch.equal(loaded(tokens, features), model(tokens, features))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "heads"), [(32, 2), (200, 2)])  # 100 channels per head as in 3B
def test_rotation_has_its_closed_form(dim, heads):
    config = llamagen.LlamaGenConfig(dim=dim, layers=1, heads=heads, grid=3, prefix=4, caption_dim=8)
    table = rotation_table(config)
    depth = config.head_dim
    assert table.shape == (4 + 9, depth // 2, 2)
    assert not table[:4].any()
    for index in range(9):
        row, column = divmod(index, 3)
        for pair in range(depth // 2):
            place, c = (row, pair) if pair < depth // 4 else (column, pair - depth // 4)
            angle = place * 10_000.0 ** (-4 * c / depth)
            assert table[4 + index, pair].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_rotation_turns_interleaved_pairs():
    table = rotation_table(TINY)
    x = torch.randn(2, len(table), 2, TINY.head_dim)
    turn = torch.view_as_complex(table.contiguous())[None, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rotate(x, table), expected)


def naive_logits(model, tokens, features, mask):
    """The transformer in float64, one image, one head and one query at a time, off the state dict."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    c = model.config
    table = rotation_table(c).double()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def turned(x, by):
        return torch.view_as_complex(x.view(-1, 2)) * torch.view_as_complex(by.contiguous())

    caption = F.gelu(features.double() @ w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    x = torch.cat([caption @ w["cls_embedding.cap_proj.fc2.weight"].T, w["tok_embeddings.weight"][tokens]])
    for n in range(c.layers):
        name = f"layers.{n}."
        qkv = norm(x, name + "attention_norm.weight") @ w[name + "attention.wqkv.weight"].T
        q, k, v = (part.unflatten(-1, (c.heads, c.head_dim)) for part in qkv.chunk(3, dim=-1))
        out = torch.zeros_like(q)
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if j == i or j >= c.prefix or mask[j]]
            for h in range(c.heads):
                qi = turned(q[i, h], table[i])
                scores = [(qi * turned(k[j, h], table[j]).conj()).real.sum() for j in seen]
                weight = (torch.stack(scores) / c.head_dim**0.5).softmax(0)
                out[i, h] = weight @ v[seen, h]
        x = x + out.flatten(1) @ w[name + "attention.wo.weight"].T
        y = norm(x, name + "ffn_norm.weight")
        y = F.silu(y @ w[name + "feed_forward.w1.weight"].T) * (y @ w[name + "feed_forward.w3.weight"].T)
        x = x + y @ w[name + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight")[c.prefix - 1 :] @ w["output.weight"].T


def test_forward_is_the_written_out_transformer(model, features):
    tokens = torch.randint(TINY.vocabulary, (2, 7))
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    logits = model(tokens, features, mask)
    assert logits.shape == (2, 8, TINY.vocabulary)
    for row in range(2):
        expected = naive_logits(model, tokens[row], features[row], mask[row])
        torch.testing.assert_close(logits[row].double(), expected, atol=2e-5, rtol=1e-4)


def test_grouped_keys_are_those_of_repeated_heads(features):
    grouped = llamagen.LlamaGen(
        llamagen.LlamaGenConfig(**{**TINY.__dict__, "heads": 4, "kv_heads": 2})
    ).eval()  # 8 channels per head
    full = llamagen.LlamaGen(llamagen.LlamaGenConfig(**{**TINY.__dict__, "heads": 4})).eval()
    state = dict(grouped.state_dict())
    for name in [n for n in state if "wqkv" in n]:
        q, k, v = state[name].split([32, 16, 16])
        spread = [part.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
        state[name] = torch.cat([q, *spread])
    full.load_state_dict(state)
    tokens = torch.randint(TINY.vocabulary, (2, 7))
    torch.testing.assert_close(grouped(tokens, features), full(tokens, features), atol=1e-5, rtol=1e-5)
