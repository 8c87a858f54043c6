"""What a record says, against the softmax written out in full; and methods replaced while a handle is bound."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

import fastrope as fr

pytest.importorskip("diffusers")
from diffusers_hosts import TINY_HOSTS, assert_differ, assert_same, grag_like, loose_like
from tiny_pipelines import kontext_generate, kontext_pipeline
from tiny_transformers import TEXT, positions_of, run

ALL = pytest.mark.parametrize("host", TINY_HOSTS.values(), ids=TINY_HOSTS)


def by_hand(host, weights: torch.Tensor, queries) -> tuple[dict, dict]:
    """Mass and root mean square distance per group from ``weights (B, H, Sq, Sk)``."""
    layout = host.layout
    spans = {"text": layout.text, "target": layout.target}
    spans |= {f"reference {n}": layout.reference(n) for n in range(len(layout.reference_grids))}
    places = positions_of(layout, host.convention)[:, 1:3].double()
    apart = (places[queries, None] - places[None]).square().sum(-1)  # (queries, S)
    mass, distance = {}, {}
    for name, span in spans.items():
        p = weights[:, :, queries, span]
        mass[name] = float(p.sum(-1).mean())
        if name != "text":
            distance[name] = float(((p * apart[:, span]).sum() / p.sum()).sqrt())
    return mass, distance


# ---- records ---------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("rotation", ["op", "host"])
def test_mass_and_distance_are_those_of_the_full_softmax(host, rotation):
    """Modulated layers and others, of which the last has text alone turned up."""
    model, call = host.build().double(), host.call(host.layout)
    mods = grag_like(host.layout) + loose_like(host.layout)
    queries = slice(host.layout.target.start + 2, host.layout.target.stop)
    method = fr.At(mods, layers=slice(1, None))
    plain, modulated = host.attend([]), host.attend(mods)
    with host.by_formulas(model, modulated), host.by_formulas(model, plain, layers={0}):
        expected = run(model, call)
    weights = [plain.weights[0], *modulated.weights]
    with fr.apply(model, method, rotation=rotation) as handle:
        out = run(model, call)
        with handle.inspect(queries=queries) as record:
            assert torch.equal(run(model, call), out)
        run(model, call)
    assert_same(out, expected)
    looks = record.looks
    assert [look.layer for look in looks] == list(range(len(weights)))
    for look, p in zip(looks, weights, strict=True):
        mass, distance = by_hand(host, p, queries)
        assert look.mass == pytest.approx(mass, rel=1e-5)
        assert look.distance == pytest.approx(distance, rel=1e-5)


def test_biases_are_seen_and_changes_of_values_are_not():
    """Mass is a share of attention, whatever is done to the values; a bias of -inf leaves a group none."""
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    reference = host.layout.reference(0)
    bias = fr.LogitBias(0.7, keys=reference)
    changes = [fr.ValueGain(-2.0, keys=reference), fr.BiasDelta(1.4, 0.2, keys=reference, on="values")]
    looks = []
    for mods in ([bias], [bias, *changes], [fr.LogitBias(-torch.inf, keys=reference)], []):
        with fr.apply(model, *mods) as handle, handle.inspect(layers=0) as record:
            out = run(model, call)
        looks.append((record.looks[0].mass, out))
    (raised, _), (same, changed), (hidden, _), (plain, stock) = looks
    assert same == pytest.approx(raised)
    assert_differ(changed, stock)
    assert hidden["reference 0"] == 0
    assert sum(hidden.values()) == pytest.approx(1)
    odds = [mass["reference 0"] / (1 - mass["reference 0"]) for mass in (raised, plain)]
    assert 1 < odds[0] / odds[1] < 2.1  # e^0.7 for every query, means over them


def test_a_record_of_nothing_bound_is_of_the_stock_attention():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    stock, attend = run(model, call), host.attend([])
    with host.by_formulas(model, attend):
        run(model, call)
    with fr.apply(model) as handle, handle.inspect(layers=[1, -1]) as record:
        assert torch.equal(run(model, call), stock)
    assert [(look.layer, look.kind) for look in record.looks] == [(1, "double"), (3, "single")]
    for look in record.looks:
        mass, distance = by_hand(host, attend.weights[look.layer], host.layout.target)
        assert look.mass == pytest.approx(mass, rel=1e-5)
        assert look.distance == pytest.approx(distance, rel=1e-5)
        assert sum(look.mass.values()) == pytest.approx(1)


def test_half_precision_models_are_looked_at_in_float32():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    with fr.apply(model) as handle, handle.inspect(layers=0) as exact:
        run(model, call)
    model.to(torch.bfloat16)
    call = {name: value.to(torch.bfloat16) for name, value in call.items()}
    with fr.apply(model) as handle, handle.inspect(layers=0) as record:
        run(model, call)
    assert record.looks[0].mass == pytest.approx(exact.looks[0].mass, rel=0.02)
    assert record.looks[0].distance == pytest.approx(exact.looks[0].distance, rel=0.02)


def test_compiled_layers_are_looked_at():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    method = fr.At(grag_like(host.layout), layers=slice(0, 2))
    with fr.apply(model, method) as handle, handle.inspect() as expected:
        run(model, call)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with fr.apply(model, method) as handle, handle.inspect() as record:
        run(model, call)
    for look, other in zip(record.looks, expected.looks, strict=True):
        assert look.mass == pytest.approx(other.mass, rel=1e-5)


def test_masked_text_gets_nothing():
    host = TINY_HOSTS["qwen-edit-plus"]
    model, call = host.build().double(), host.call(host.layout)
    mask = torch.zeros(2, TEXT)
    mask[:, 0] = 1
    with fr.apply(model) as handle:
        with handle.inspect(layers=0) as open_record:
            run(model, call)
        with handle.inspect(layers=0) as masked:
            run(model, call | {"encoder_hidden_states_mask": mask})
    assert masked.looks[0].mass["text"] < open_record.looks[0].mass["text"]
    assert sum(masked.looks[0].mass.values()) == pytest.approx(1)


def test_a_run_of_a_pipeline(tmp_path, monkeypatch):
    """Both branches of guidance, some steps, a drawing."""
    pytest.importorskip("matplotlib")
    pipe = kontext_pipeline()
    with fr.apply(pipe, grag_like(TINY_HOSTS["kontext"].layout)) as handle:
        with handle.inspect(layers=range(2), steps={0, 2}) as record:
            kontext_generate(pipe, steps=3, lengths=(TEXT, TEXT))
        kontext_generate(pipe, steps=3)
    assert [(look.call, look.step, look.layer) for look in record.looks] == [
        (call, step, layer) for call, step in ((0, 0), (1, 0), (4, 2), (5, 2)) for layer in (0, 1)
    ]
    by_layer, by_step = (record.mean("mass", by) for by in ("layer", "step"))
    assert list(by_layer) == list(by_step) == ["text", "target", "reference 0"]
    assert list(by_step["text"]) == [0, 2]
    looks = [look.mass["text"] for look in record.looks if look.layer == 1]
    assert by_layer["text"][1] == pytest.approx(sum(looks) / 4)
    assert list(record.mean("distance", "layer")) == ["target", "reference 0"]
    record.plot(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an installation without it looks like
    with pytest.raises(ImportError, match=r'^matplotlib is not installed: pip install "fastrope\[demo\]"$'):
        record.plot(tmp_path / "attention.png")


def test_one_record_at_a_time():
    host = TINY_HOSTS["kontext"]
    model, call = host.build(), host.call(host.layout, dtype=torch.float32)
    with fr.apply(model) as handle:
        first = handle.inspect(layers=0)
        with pytest.raises(ValueError, match=r"^handle: expected one record at a time"):
            handle.inspect()
        first.stop()
        second = handle.inspect(layers=0)
        first.stop()  # is over already
        run(model, call)
        assert (len(first.looks), len(second.looks)) == (0, 1)
        second.stop()
        with pytest.raises(ValueError, match=r"^queries: expected"):
            handle.inspect(queries="text")
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle"):
        handle.inspect()
    for what, by, name in (("weight", "layer", "what"), ("mass", "head", "by")):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            second.mean(what, by)
    with pytest.raises(ValueError, match=r"^record: expected a run"):
        first.plot("nothing.png")


# ---- update ----------------------------------------------------------------------------------------------------------


def test_methods_are_replaced_without_applying_again():
    host = TINY_HOSTS["kontext"]
    model, call = host.build().double(), host.call(host.layout)
    expected = {}
    for delta in (0.5, 2.0):
        with host.by_formulas(model, host.attend([fr.BiasDelta(1.0, delta, keys=host.layout.references)])):
            expected[delta] = run(model, call)
    stock, dial = run(model, call), fr.GRAG(delta=0.5)
    with fr.apply(model, dial) as handle:
        bound = model.attn_processors
        assert_same(run(model, call), expected[0.5])
        handle.update(replace(dial, delta=2.0))
        assert_same(run(model, call), expected[2.0])
        assert handle.methods == (replace(dial, delta=2.0),)
        handle.update()
        assert torch.equal(run(model, call), stock)
        with pytest.raises(ValueError, match=r"^methods: expected modulations"):
            handle.update(3)
        assert all(model.attn_processors[name] is p for name, p in bound.items())
    with pytest.raises(ValueError, match=r"^handle: expected a bound handle"):
        handle.update()


def test_methods_are_replaced_in_the_middle_of_a_run():
    pipe, sites = kontext_pipeline(), []
    first, second = (
        types.SimpleNamespace(modulations=lambda site, name=name: sites.append((name, site.step)) or [])
        for name in ("first", "second")
    )

    def swap(pipe, step, timestep, tensors):
        if step == 0:
            handle.update(second)
        return tensors

    with fr.apply(pipe, first) as handle:
        kontext_generate(pipe, steps=2, callback_on_step_end=swap)
    assert sites == [("first", 0)] * 4 + [("second", 1)] * 4


def test_raw_modulations_and_methods_together():
    host = TINY_HOSTS["qwen-edit-plus"]
    model, call = host.build().double(), host.call(host.layout)
    mods = [fr.BiasDelta(1.0, 1.3 if n else 1.1, keys=host.layout.reference(n)) for n in range(2)]
    with host.by_formulas(model, host.attend(mods + loose_like(host.layout))):
        expected = run(model, call)
    first = types.SimpleNamespace(modulations=lambda site: mods[:1])
    with fr.apply(model, [first, mods[1]], loose_like(host.layout)):
        out = run(model, call)
    assert_same(out, expected, 1e-10)
    assert_differ(out, run(model, call))
