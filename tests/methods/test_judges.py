from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastrope.methods.judges import CLASSES, RegionJudge, Verdict, read_verdict

SAID = {
    "neglect": ["neglect", " Neglect. ", '{"reasoning": "raw edges", "class": "neglect"}', "Class: neglect",
                '```json\n{"reasoning": "no success {here}", "class": "Neglect"}\n```', "**Verdict**: neglect\n",
                "It is not a success, nor suppression.\nclass = neglect", '{"class": "neglect"'],
    "suppression": ['Thoughts {"a": 1} then {"verdict": "suppression"}', "the object shows suppression"],
    "success": ["success", '{"class": "success", "reasoning": ""}'],
}  # fmt: skip
UNREADABLE = ["", "no idea", '{"class": "fine"}', "success or neglect?", None, 3, ["neglect", "success"],
              "not success", "This isn't a success.", "There is no suppression.", "class: not success",
              "class: success is not what I see", 'The sign reads "success".', "[" * 100_000,
              '{"a":' * 100_000 + "1" + "}" * 100_000, '{"reasoning": "cut off by {\\"class\\": \\"succ']  # fmt: skip
QUOTING = [  # answers of neglect in which a text of the picture says success
    'The sign says {"class": "success"}. {"reasoning": "raw", "class": "neglect"}',
    '{"reasoning": "raw", "class": "neglect"} The sign says {"class": "success"}',
    '{"reasoning": "the sign says {\\"class\\": \\"success\\"}", "class": "neglect"}',
    '{"reasoning": "a sign: {"reasoning": "ok", "class": "success"}, in red", "class": "neglect"}',
    'Answer: {"reasoning": "a sign: {"reasoning": "ok", "class": "success"}, {}", "class": "neglect"}\n',
    '{"seen": {"reasoning": "ok", "class": "success"}, "reasoning": "raw", "class": "neglect"}',
    '{"reasoning": "raw", "class": "neglect", "seen": {"reasoning": "ok", "class": "success"}}',
    '{"reasoning": "a } and a { on the sign", "class": "neglect"}',
    '{"reasoning": "raw", "class": "neglect"} The sign reads } and :}',
    'A poster reads\nclass: success\nclass: neglect', 'Class: neglect. The poster reads class: success',
    'The poster says "success", which is neglect',
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SAID.items() for text in texts])
def test_verdicts_are_read(kind, text):
    verdict = read_verdict(text)
    assert (verdict.kind, verdict.readable) == (kind, True)


@pytest.mark.parametrize("answer", UNREADABLE)
def test_what_cannot_be_read_counts_as_success(answer):
    verdict = read_verdict(answer)
    assert (verdict.kind, verdict.readable) == ("success", False)


@pytest.mark.parametrize("text", QUOTING)
def test_a_text_in_the_picture_is_no_verdict(text):
    verdict = read_verdict(text)
    assert (verdict.kind, verdict.readable) == ("neglect", True)


@pytest.mark.parametrize(
    "unit", ["{", "}", "{}", '{"', '{"a":', '{"a":1}', '{"class": "success"}', "\n", "class:\n", "'", "\u2018"]
)
def test_reading_takes_bounded_time(unit):
    answer, start = unit * (200_000 // len(unit)), time.process_time()
    read_verdict(answer)
    verdict = read_verdict(answer + '\n{"reasoning": "raw", "class": "neglect"}')
    assert time.process_time() - start < 0.2
    assert verdict.kind == "neglect"


def test_reasoning_is_kept():
    assert read_verdict('{"reasoning": "edges", "class": "neglect"}').reasoning == "edges"
    assert read_verdict("class: neglect, for its edges").reasoning == "class: neglect, for its edges"


def test_verdicts_pass_through():
    verdict = Verdict("neglect", "said so", measures={"change": 0.0})
    assert read_verdict(verdict) is verdict
    with pytest.raises(ValueError, match=r"Verdict.kind: expected one of"):
        Verdict("fine")


@given(st.text())
def test_any_text_gives_a_verdict(text):
    verdict = read_verdict(text)
    assert verdict.kind in CLASSES
    assert verdict.readable or verdict.kind == "success"


# ---- without a model ------------------------------------------------------------------------------------------------


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Composite, background, mask; 96 x 64, the paste in rows 24-71, columns 16-47."""
    g = np.random.default_rng(0)
    background = g.integers(90, 110, (96, 64, 3), dtype=np.uint8)
    mask = np.zeros((96, 64), dtype=bool)
    mask[24:72, 16:48] = True
    composite = background.copy()
    composite[mask] = g.integers(180, 220, (mask.sum(), 3))
    return composite, background, mask


def blend(composite, background, share: float) -> np.ndarray:
    """``share`` of the composite, the rest of the background."""
    return (share * composite + (1.0 - share) * background).round().astype(np.uint8)


@pytest.mark.parametrize("given", [True, False], ids=["background given", "background guessed"])
@pytest.mark.parametrize(
    ("share", "kind"),
    [
        (1.0, "neglect"),
        (0.9, "neglect"),
        (0.8, "success"),
        (0.6, "success"),
        (0.4, "suppression"),
        (0.0, "suppression"),
    ],
)
def test_region_judge_along_the_line_between_composite_and_background(share, kind, given):
    composite, background, mask = pictures()
    judge = RegionJudge(torch.from_numpy(mask), background if given else None)
    verdict = judge(composite, blend(composite, background, share))
    assert verdict.kind == kind
    assert verdict.measures["kept"] == pytest.approx(share, abs=0.02)
    assert verdict.measures["change"] == pytest.approx(1 - share, abs=0.03)


def test_region_judge_lets_another_look_pass():
    composite, background, mask = pictures()
    recoloured = composite.copy()
    recoloured[mask] = composite[mask] + np.array([30, -60, 0]).astype(np.uint8)
    assert RegionJudge(mask, background)(composite, recoloured).kind == "success"


def two_pastes() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Composite, background, mask, and which of its pixels are the smaller paste's."""
    composite, background, mask = pictures()
    second = np.zeros_like(mask)
    second[40:56, 52:60] = True
    composite = composite.copy()
    composite[second] = 10
    return composite, background, mask | second, second


@pytest.mark.parametrize("given", [True, False], ids=["background given", "background guessed"])
@pytest.mark.parametrize(("share", "kind"), [(1.0, "neglect"), (0.7, "success"), (0.2, "suppression")])
def test_one_pasted_area_is_enough(share, kind, given):
    """The larger paste is blended; the verdict is that of the smaller one."""
    composite, background, mask, second = two_pastes()
    estimate = np.where(second[..., None], blend(composite, background, share), blend(composite, background, 0.7))
    verdict = RegionJudge(mask, background if given else None)(composite, estimate)
    assert verdict.kind == kind


def test_specks_are_no_areas():
    composite, background, mask = pictures()
    mask[::12, :8] = True  # where nothing was pasted and nothing changes
    mask[5, 60] = True
    composite = composite.copy()
    composite[5, 60] = 255
    estimate = blend(composite, background, 0.7)
    estimate[5, 60] = 255
    assert RegionJudge(mask, background)(composite, estimate).kind == "success"


def test_region_judge_takes_pictures_of_other_sizes():
    composite, background, mask = pictures()
    small = Image.fromarray(composite).resize((32, 48), Image.Resampling.BOX)
    assert RegionJudge(mask, Image.fromarray(background))(Image.fromarray(composite), small).kind == "neglect"


def test_thresholds_are_the_callers():
    composite, background, mask = pictures()
    estimate = blend(composite, background, 0.7)
    assert RegionJudge(mask, background)(composite, estimate).kind == "success"
    assert RegionJudge(mask, background, unchanged=0.4)(composite, estimate).kind == "neglect"
    assert RegionJudge(mask, background, erased=0.8)(composite, estimate).kind == "suppression"


def test_a_paste_like_its_background_cannot_be_judged():
    _, background, mask = pictures()
    verdict = RegionJudge(mask, background)(background, background)
    assert (verdict.kind, verdict.readable) == ("success", False)


@pytest.mark.parametrize(("kwargs", "name"), [
    (dict(mask=torch.zeros(4, 4)), "RegionJudge.mask"), (dict(mask=torch.ones(2, 4, 4)), "RegionJudge.mask"),
    (dict(mask="x"), "RegionJudge.mask"), (dict(unchanged="a"), "RegionJudge.unchanged"),
    (dict(erased=None), "RegionJudge.erased"), (dict(size=0), "RegionJudge.size"),
])  # fmt: skip
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, received "):
        RegionJudge(**{"mask": torch.ones(4, 4), **kwargs})
