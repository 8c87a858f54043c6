"""The chat judge on a tiny random Qwen3-VL: real model, real tokenizer and picture processor, no download."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import fastrope as fr

transformers = pytest.importorskip("transformers")
# transformers 5: the picture processor that needs no torchvision
pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
from tokenizers import Tokenizer, decoders, models  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from fastrope.bindings.transformers.judge import SIZE, TASK, ChatJudge, Example  # noqa: E402

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}\
{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class PictureProcessor(Qwen3VLProcessor):
    """Without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        if name != "video_processor":
            return super().check_argument_for_proper_class(name, argument)
        return type(argument)


@pytest.fixture(scope="module")
def processor():
    bytes_alone = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bytes_alone.pre_tokenizer, bytes_alone.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token=SPECIAL[1], pad_token=SPECIAL[1], additional_special_tokens=SPECIAL
    )
    pictures = pil.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 4 * 56 * 56})
    return PictureProcessor(pictures, tokenizer, video_processor=None, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(processor):
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, vocab_size=len(processor.tokenizer), rope_parameters=rope, eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14, out_hidden_size=32,
            deepstack_visual_indexes=[0], num_position_embeddings=64,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config).eval()


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def saying(model, processor, monkeypatch, text: str, seen: list) -> None:
    """Let the model generate ``text``, whatever it is asked."""
    new = torch.tensor([processor.tokenizer(text + "<|im_end|>")["input_ids"]])

    def generate(input_ids, **kwargs):
        seen.append({"input_ids": input_ids, **kwargs})
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model, "generate", generate)


def test_a_random_model_answers_and_counts_as_success(model, processor):
    judge = ChatJudge(model, processor, max_new_tokens=8)
    verdict = judge(picture(0), picture(1))
    assert (verdict.kind, verdict.readable) == ("success", False)
    assert verdict.reasoning == judge.answer(picture(0), picture(1)).strip()  # greedy: the same again


@pytest.mark.parametrize("kind", ["success", "neglect", "suppression"])
def test_answers_are_cut_off_the_prompt_and_read(model, processor, monkeypatch, kind):
    """The prompt itself names all three classes."""
    seen = []
    saying(model, processor, monkeypatch, json.dumps({"reasoning": "Kanten; hårt ljus", "class": kind}), seen)
    verdict = ChatJudge(model, processor, max_new_tokens=99)(picture(0), picture(1))
    assert (verdict.kind, verdict.readable, verdict.reasoning) == (kind, True, "Kanten; hårt ljus")
    assert (seen[0]["max_new_tokens"], seen[0]["do_sample"]) == (99, False)


def test_both_pictures_reach_the_model(model, processor, monkeypatch):
    seen = []
    saying(model, processor, monkeypatch, "success", seen)
    judge = ChatJudge(model, processor)
    for pair in ((0, 1), (0, 2), (1, 0), (0, 1)):
        judge(*(picture(seed) for seed in pair))
    assert seen[0]["image_grid_thw"].shape == (2, 3)
    pixels = [call["pixel_values"] for call in seen]
    assert torch.equal(pixels[0], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


def test_conversation(model, processor):
    examples = [
        Example(picture(1), picture(2), "looks raw", "neglect"),
        Example(picture(3), picture(4), "fits", "success"),
    ]
    messages = ChatJudge(model, processor, examples).messages(picture(0, (1000, 600)), picture(5, (64, 256)))
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "visual analyst" in messages[0]["content"][0]["text"]
    answers = [json.loads(m["content"][0]["text"]) for m in messages[2:5:2]]
    assert answers == [{"reasoning": "looks raw", "class": "neglect"}, {"reasoning": "fits", "class": "success"}]
    *pictures, task = messages[-1]["content"]
    assert [p["image"].size for p in pictures] == [(SIZE, 307), (128, SIZE)]
    assert all(f'"{kind}"' in task["text"] for kind in ("success", "neglect", "suppression"))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<|image_pad|>") == 6


def test_classes_are_defined_as_the_authors_mean_them():
    """Neglect is a background of the crop's own in any area, suppression also what is missing in part."""
    said = dict(re.findall(r'^- "(\w+)": (.*)$', TASK, re.MULTILINE))
    assert list(said) == ["success", "neglect", "suppression"]
    for kind, words in {
        "success": ("background of the crop is gone", "scene's own background", "all pasted areas", "whole"),
        "neglect": ("any of the pasted areas", "own background", "filler", "line where it ends"),
        "suppression": ("lost its identity", "parts of it are missing"),
    }.items():
        for word in words:
            assert word in said[kind]


def test_loading(model, processor, monkeypatch, tmp_path):
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    judge = ChatJudge.from_pretrained(str(tmp_path), device="cpu", max_new_tokens=8)
    assert type(judge.model) is Qwen3VLForConditionalGeneration
    assert judge.answer(picture(0), picture(1)) == ChatJudge(model, processor, max_new_tokens=8).answer(
        picture(0), picture(1)
    )


def test_a_name_is_enough_to_steer(model, processor, monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    from methods import tiny_run

    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    method = fr.LooseRoPE.from_images(*tiny_run.pasted())
    call = tiny_run.arguments() | {"output_type": "np"}
    steered = fr.steer(tiny_run.pipeline(), method, str(tmp_path), **call)
    assert [(t.verdict.kind, t.verdict.readable) for t in steered.tries] == [("success", False)]


@pytest.mark.parametrize(("make", "name"), [
    (lambda: ChatJudge(None, None, examples=["x"]), r"examples\[0\]"),
    (lambda: ChatJudge(None, None, max_new_tokens=0), "max_new_tokens"),
    (lambda: Example(picture(0), picture(1), "", "fine"), "Example.kind"),
    (lambda: Example("a.png", picture(1), "", "success"), "Example.composite"),
])  # fmt: skip
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        make()
