"""Plain words for the tiny models: what they mean, and what is not understood."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("safetensors")
from hypothesis import given
from hypothesis import strategies as st

from fastrope import lab
from fastrope.commands.words import NUMBERS, understand
from fastrope.lab.scenes import COLOURS, TEXTURES


@pytest.mark.parametrize(("text", "slots"), [
    ("Make it a 7.", {"task": "digit", "digit": 7}),
    ("turn it into a seven", {"task": "digit", "digit": 7}),
    ("recolour to green", {"task": "recolour", "ink": "green"}),
    ("recolor it green", {"task": "recolour", "ink": "green"}),
    ("a blue background, with checks", {"task": "background", "ground": "blue", "texture": "checks"}),
    ("make the background blue", {"task": "background", "ground": "blue"}),
    ("make it a red 7 on a white ground", {"task": "digit", "digit": 7, "ink": "red", "ground": "white"}),
    ("blend", {"task": "blend"}), ("keep the picture as it is", {"task": "keep"}),
])  # fmt: skip
def test_edits(text, slots):
    assert understand("--prompt", text, editing=True) == slots
    assert set(lab.prompt(**slots)) == {"prompt_embeds", "pooled_prompt_embeds"}


@pytest.mark.parametrize(("text", "slots"), [
    ("", {}), ("a red 3 on blue", {"digit": 3, "ink": "red", "ground": "blue"}),
    ("a 0 on green in rows", {"digit": 0, "ground": "green", "texture": "rows"}), ("black", {"ink": "black"}),
])  # fmt: skip
def test_drawings(text, slots):
    assert understand("--prompt", text, editing=False) == {"task": "draw", **slots}


@pytest.mark.parametrize(("text", "message"), [
    ("make it winter", "--prompt: expected words that the tiny model knows: a digit, the colours red, .*, rec"),
    ("a 12", "received '12'"), ("a ☃", "received '☃'"), ("3 or 4", "received 'or'"),
    ("a 3 and a 4", "--prompt: expected one digit, received 3 and 4"),
    ("", "--prompt: expected something to change"), ("make it", "--prompt: expected something to change"),
])  # fmt: skip
def test_what_is_not_understood(text, message):
    with pytest.raises(ValueError, match=message):
        understand("--prompt", text, editing=True)


@given(st.sampled_from(NUMBERS), st.sampled_from(COLOURS), st.sampled_from(COLOURS), st.sampled_from(TEXTURES))
def test_every_word_is_known(digit, ink, ground, texture):
    found = understand("--prompt", f"draw a {ink} {digit} on {ground} {texture}", editing=False)
    assert list(found.values()) == ["draw", ink, NUMBERS.index(digit), ground, texture]


@given(st.text(max_size=30))
def test_any_text_is_understood_or_refused(text):
    with contextlib.suppress(ValueError):
        lab.prompt(**understand("--prompt", text, editing=False))
