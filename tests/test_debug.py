"""Debug mode names what is wrong, and is silent when nothing is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from numerics import skip_unless_runnable
from torch.utils.flop_counter import FlopCounterMode

import fastrope
import fastrope as fr
from fastrope import debug
from fastrope.backends import reference, sdpa
from fastrope.device import switched_on

B, S, H, D = 2, 48, 2, 16
REFERENCE = slice(24, None)
BAD = (float("nan"), float("inf"), -float("inf"))


def call(dtype=torch.float32) -> dict:
    """Arguments of a healthy call with one modulation of each kind."""
    place = torch.arange(S)
    positions = torch.stack((place // 24, place % 24 // 6, place % 6), dim=1)
    return {
        "q": torch.randn(B, S, H, D, dtype=dtype),
        "k": torch.randn(B, S, H, D, dtype=dtype),
        "v": torch.randn(B, S, H, D, dtype=dtype),
        "rope": fr.RoPE.axial(positions, axes_dim=(4, 6, 6)),
        "scale": torch.linspace(0.5, 1.0, S),
        "weight": torch.linspace(0.5, 1.5, D // 2),
        "bias": torch.tensor([1.1, 0.9]),
        "delta": torch.tensor([1.2, 1.0]),
        "gain": torch.linspace(1.0, 2.0, S).expand(B, S).clone(),
        "key_mask": None,
    }


def attend(arguments: dict, **options):
    a = dict(arguments)
    modulations = [
        fr.QueryScale(a.pop("scale"), keys=REFERENCE, axes=(1, 2)),
        fr.BandWeight(a.pop("weight"), keys=REFERENCE),
        fr.BiasDelta(a.pop("bias"), a.pop("delta"), keys=REFERENCE),
        fr.LogitGain(a.pop("gain"), keys=REFERENCE),
    ]
    return fr.attention(a.pop("q"), a.pop("k"), a.pop("v"), modulations=modulations, **a, **options)


# ---- switching it on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, False), ("", False), *((word, False) for word in ("0", "false", "off", "no", "False", " OFF ")),
        *((word, True) for word in ("1", "true", "on", "yes", "True")),
    ],
)  # fmt: skip
def test_environment(value, expected, monkeypatch):
    monkeypatch.delenv("FASTROPE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTROPE_DEBUG", value)
    assert debug.enabled(None) is expected
    assert debug.enabled(True) is True
    assert debug.enabled(False) is False


@pytest.mark.parametrize("name", ["FASTROPE_DEBUG", "FASTROPE_TMA", "FASTROPE_POLYNOMIAL"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ValueError, match=rf"^{name}: expected one of 1, true, .*, received 'maybe'$"):
        switched_on(name, default=True)


def test_switches_are_read_in_one_place():
    """Another reader would have rules of its own."""
    root = Path(fastrope.__file__).parent
    readers = {p.name for p in root.rglob("*.py") if re.search(r"environ\W.*FASTROPE_", p.read_text(encoding="utf-8"))}
    assert readers <= {"device.py", "doctor.py"}, "read them with fastrope.device.switched_on"


def test_environment_reaches_the_call(monkeypatch):
    arguments = call()
    arguments["q"][0, 0, 0, 0] = float("nan")
    monkeypatch.setenv("FASTROPE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^q: expected finite"):
        attend(arguments)
    monkeypatch.setenv("FASTROPE_DEBUG", "0")
    assert attend(arguments).isnan().any()


def test_a_plan_is_checked_too():
    arguments = call()
    plan = fr.plan(rope=fr.RoPE(arguments["rope"].angles * float("nan")))
    with pytest.raises(ValueError, match=r"^rope.angles: expected finite"):
        fr.attention(arguments["q"], arguments["k"], arguments["v"], plan=plan, debug=True)


# ---- finite ---------------------------------------------------------------------------------------------------------

PLACES = {
    "q": ((1, 7, 0, 3), "q", "batch row 1, query 7, head 0, channel 3"),
    "k": ((0, 30, 1, 2), "k", "batch row 0, key 30, head 1, channel 2"),
    "v": ((1, 47, 1, 15), "v", "batch row 1, key 47, head 1, channel 15"),
    "scale": ((5,), "QueryScale.scale", "query 5"),
    "weight": ((6,), "BandWeight.weight", "pair 6"),
    "bias": ((1,), "BiasDelta.bias", "batch row 1"),
    "delta": ((0,), "BiasDelta.delta", "batch row 0"),
    "gain": ((1, 40), "LogitGain.gain", "batch row 1, query 40"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("argument", PLACES)
def test_a_value_that_is_not_finite_is_named_and_located(argument, bad):
    index, name, where = PLACES[argument]
    arguments = call()
    arguments[argument][index] = bad
    with pytest.raises(ValueError, match="expected finite values") as error:
        attend(arguments, debug=True)
    message = str(error.value)
    assert message.startswith(f"{name}: expected finite values, received {bad} at {where} (1 of ")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["rope", "key_rope"])
def test_angles_that_are_not_finite_are_named(name, bad):
    arguments = call()
    angles = arguments["rope"].angles.clone()
    angles[9, 4] = bad
    arguments[name] = fr.RoPE(angles, arguments["rope"].axis)
    with pytest.raises(ValueError, match=rf"^{name}.angles: expected finite values, received {bad} at token 9, pair 4"):
        attend(arguments, debug=True)


def test_scalars_are_checked():
    arguments = call()
    arguments["bias"] = float("nan")
    with pytest.raises(ValueError, match=r"^BiasDelta.bias: expected finite values, received nan at index 0"):
        attend(arguments, debug=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_may_hold_anything(dtype):
    arguments = call(dtype)
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 3], mask[1, 20:28] = False, False
    for name in ("k", "v"):
        arguments[name][~mask] = float("nan")
    out = attend({**arguments, "key_mask": mask}, debug=True)
    assert out.isfinite().all()
    mask[0, 3] = True
    with pytest.raises(ValueError, match=r"^k: .* at batch row 0, key 3, "):
        attend({**arguments, "key_mask": mask}, debug=True)


def test_no_key_at_all_is_no_error():
    arguments = call()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1] = False
    assert attend({**arguments, "key_mask": mask}, debug=True)[1].abs().max() == 0


# ---- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "factor", "dtype", "message"),
    [
        ("q", 1e37, torch.float32, r"^q, k: expected logits within torch.float32, received values that may reach"),
        ("gain", 1e38, torch.float32, r"^LogitGain.gain: expected logits within torch.float32"),
        ("weight", 1e37, torch.float32, r"^BandWeight.weight: expected logits within torch.float32"),
        ("weight", 1e5, torch.float16, r"^BandWeight.weight: expected modulated keys within torch.float16"),
        ("delta", 1e5, torch.float16, r"^BiasDelta.bias, BiasDelta.delta: expected modulated keys within"),
    ],
)
def test_overflow_is_blamed_on_the_argument_that_causes_it(argument, factor, dtype, message):
    arguments = call(dtype)
    arguments[argument] = arguments[argument] * factor
    with pytest.raises(ValueError, match=message):
        attend(arguments, debug=True)


def test_softmax_scale_out_of_range():
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(ValueError, match=r"^scale: expected logits within torch.float32"):
        fr.attention(q, q, q, scale=1e38, debug=True)


def test_angles_too_large_to_tell_positions_apart():
    q = torch.randn(1, 8, 2, 16)
    rope = fr.RoPE(torch.full((8, 8), 1e7))
    with pytest.raises(ValueError, match=r"^rope.angles: expected angles below 8.39e\+05 rad"):
        fr.attention(q, q, q, rope=rope, debug=True)
    fr.attention(q, q, q, rope=fr.RoPE(rope.angles.double()), debug=True)


# ---- agreement with the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_healthy_calls_pass(backend, dtype, masked, seed):
    torch.manual_seed(seed)
    arguments = call(dtype)
    if masked:
        arguments["key_mask"] = torch.rand(B, S) > 0.3
    with_checks = attend(arguments, backend=backend, debug=True)
    assert torch.equal(with_checks, attend(arguments, backend=backend, debug=False))


def test_grouped_heads_and_gradients_pass():
    q, k, v = (torch.randn(1, 40, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    fr.attention(q, k, v, rope=fr.RoPE(torch.rand(40, 16)), debug=True).sum().backward()
    assert q.grad.isfinite().all()


def test_a_backend_that_disagrees_is_reported(monkeypatch):
    honest = sdpa.run

    def wrong(*args):
        out, lse = honest(*args)
        return out + 0.1, lse

    monkeypatch.setattr(sdpa, "run", wrong)
    with pytest.raises(RuntimeError, match=r"backend sdpa disagrees with the reference .* expected an error of"):
        attend(call(), backend="sdpa", debug=True)


@pytest.mark.parametrize("query", [17, 31])
def test_queries_with_extreme_values_are_in_the_sample(query, monkeypatch):
    """One query of many is scaled, and only there the backend is wrong."""
    tokens = 400
    q = torch.randn(1, tokens, 1, 16)
    scale = torch.ones(tokens)
    scale[query] = 0.5
    honest = sdpa.run

    def wrong(*args):
        out, lse = honest(*args)
        out[:, query] += 1
        return out, lse

    monkeypatch.setattr(sdpa, "run", wrong)
    rope = fr.RoPE(torch.rand(tokens, 8))
    with pytest.raises(RuntimeError, match="disagrees with the reference"):
        fr.attention(q, q, q, rope=rope, modulations=[fr.QueryScale(scale)], backend="sdpa", debug=True)


def test_an_output_that_is_not_finite_is_located(monkeypatch):
    def overflow(q, *args):
        out = torch.zeros_like(q)
        out[1, 2, 0, 5] = float("inf")
        return out, None

    monkeypatch.setattr(sdpa, "run", overflow)
    with pytest.raises(RuntimeError, match=r"received inf at batch row 1, query 2, head 0, channel 5 \(1 of "):
        attend(call(), backend="sdpa", debug=True)


def test_deviation_reports_the_error_it_finds():
    arguments = call()
    plan = fr.plan(rope=arguments["rope"], modulations=[fr.LogitGain(arguments["gain"], keys=REFERENCE)])
    tensors = arguments["q"], arguments["k"], arguments["v"]
    out, _ = reference.run(*tensors, plan.resolved, 0.25)
    error, allowed = debug.deviation(*tensors, plan.resolved, 0.25, out)
    assert error <= allowed < 1e-5
    out[0, 0, 0, 0] += 0.5
    assert debug.deviation(*tensors, plan.resolved, 0.25, out)[0] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_a_mode_that_watches_ops_switches_nothing_off(backend):
    skip_unless_runnable(backend)
    arguments = call()
    arguments["k"][0, 3, 0, 0] = torch.nan
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="k: expected finite values"):
        attend(arguments, backend=backend, debug=True)


def test_off_means_off(monkeypatch):
    monkeypatch.delenv("FASTROPE_DEBUG", raising=False)

    def forbidden(*args):
        raise AssertionError("debug mode ran")

    monkeypatch.setattr(debug, "check_inputs", forbidden)
    monkeypatch.setattr(debug, "check_output", forbidden)
    attend(call())
