"""The bars, judged from constructed rows: passed, missed, not measured."""

from __future__ import annotations

import pytest
from bench_rows import timed

from fastrope.bench import gates

CUDNN, OURS = "cudnn", "fastrope-triton"


def judged(rows) -> dict[str, dict]:
    return {row["figure"]: row for row in gates.table(rows)}


def verdict(rows, beginning: str) -> tuple[str, str]:
    (row,) = (row for figure, row in judged(rows).items() if figure.startswith(beginning))
    return row["verdict"], row["measured"]


def test_without_rows_nothing_is_measured():
    table = gates.table([])
    assert len(table) == 12
    assert {row["verdict"] for row in table} == {"not measured"}
    assert "0 passed, 0 missed, 12 not measured." in gates.render([])
    assert gates.render([]).count("### Bars") == 1


def test_an_h100_has_a_table_of_its_own():
    rows = [
        timed("all", OURS, ms, plain_ms=2.0) | {"gpu": f"NVIDIA {gpu}"} for ms, gpu in ((2.0, "H200"), (9.0, "H100"))
    ]
    first, second = gates.render(rows).split("### Bars (H100")
    assert "1.00 x" in first
    assert "4.50 x" in second


@pytest.mark.parametrize(
    "changes", [{"gpu": "NVIDIA H100"}, {"gpu": "cpu"}, {"dtype": "float16"}, {"workload": "flux"}]
)
def test_rows_of_another_device_dtype_or_workload_do_not_count(changes):
    rows = [timed("all", OURS, 2.0, plain_ms=2.0)]
    assert verdict(rows, "everything at once")[0] == "passed, aim met"
    assert verdict([{**row, **changes} for row in rows], "everything at once")[0] == "not measured"


@pytest.mark.parametrize(
    ("ms", "expected"), [(1.0, "passed, aim met"), (1.2, "passed"), (1.25, "passed"), (1.26, "missed")]
)
def test_the_plain_loop_against_cudnn(ms, expected):
    rows = [timed("plain", CUDNN, 1.0, rotation="before"), timed("plain", OURS + "-applied", ms, rotation="before")]
    assert verdict(rows, "fused loop") == (expected, f"{1 / ms:.2f} x")


@pytest.mark.parametrize(
    ("case", "beginning", "bar", "aim", "workload"),
    [
        ("loose-levels", "LooseRoPE, five", 1.12, 1.05, "kontext"),
        ("loose-per-query", "LooseRoPE, all", 1.40, 1.15, "kontext"),
        ("all", "everything at once", 1.20, 1.10, "kontext"),
        ("all", "33k tokens", 1.15, 1.05, "tokens-33k"),
    ],
)
def test_modulated_over_our_own_plain(case, beginning, bar, aim, workload):
    for ratio, expected in ((aim, "passed, aim met"), (bar, "passed"), (bar + 0.01, "missed")):
        rows = [timed(case, OURS, ratio, plain_ms=1.0, workload=workload)]
        assert verdict(rows, beginning)[0] == expected
    assert verdict([timed(case, OURS, 1.0, workload=workload)], beginning)[0] == "not measured"  # no plain time


def test_bars_of_the_loop_say_so():
    """Those of ``auto`` over its own plain call are others: they are in the table of calls."""
    rows = [
        timed(case, OURS, 1.0, plain_ms=1.0)
        for case in ("grag", "bands", "crop-gain", "loose-levels", "loose-per-query", "all")
    ]
    rows += [timed("all", OURS, 1.0, plain_ms=1.0, workload="tokens-33k")]
    found = [figure for figure, row in judged(rows).items() if row["verdict"] != "not measured"]
    assert len(found) == 5
    assert all("fused loop" in figure for figure in found)
    assert gates.LOOP in gates.render(rows)


def test_the_worst_of_three_counts_and_none_may_be_missing():
    def rows(**ratios):
        return [timed(case.replace("_", "-"), OURS, ratio, plain_ms=1.0) for case, ratio in ratios.items()]

    beginning = "GRAG, bands"
    assert verdict(rows(grag=1.01, bands=1.0, crop_gain=1.02), beginning) == ("passed, aim met", "1.02 x (crop-gain)")
    assert verdict(rows(grag=1.01, bands=1.04, crop_gain=1.02), beginning) == ("passed", "1.04 x (bands)")
    assert verdict(rows(grag=1.06, bands=1.0, crop_gain=1.07), beginning)[0] == "missed by grag, crop-gain"
    assert verdict(rows(grag=1.01, bands=1.0), beginning) == ("not measured", "1.01 x (grag); without crop-gain")
    assert verdict(rows(grag=1.06), beginning)[0] == "missed"


def test_auto_is_held_against_the_fastest_that_computes_the_same():
    def rows(ms, **changes):
        ours = timed("all", "fastrope-auto", ms, ours=True, **changes)
        others = [timed("all", "careful-cudnn", 2.0), timed("all", "flex", 3.0), timed("all", OURS, 0.1, ours=True)]
        return [ours, *others, timed("plain", "cudnn", 0.5, rotation="before"), timed("grag", "careful-cudnn", 0.5)]

    beginning = "`auto` over"
    assert verdict(rows(1.5), beginning) == ("passed, aim met", "0.75 x")
    assert verdict(rows(1.9), beginning)[0] == "passed"
    assert verdict(rows(2.03), beginning) == ("passed", "1.01 x")  # the spreads meet
    assert verdict(rows(2.1), beginning)[0] == "missed"
    assert verdict(rows(2.1, rotation="before"), beginning)[0] == "not measured"  # nobody does the same
    assert verdict(rows(2.1, date="2026-02-02"), beginning)[0] == "not measured"  # of another run


def test_every_case_is_held_against_its_fastest():
    rows = [
        timed("all", "fastrope-auto", 1.0, ours=True), timed("all", "flex", 2.0),
        timed("grag", "fastrope-auto", 2.2, ours=True), timed("grag", "flex", 2.0),
        timed("plain", "fastrope-auto-applied", 1.0, ours=True, rotation="before"),
        timed("plain", "cudnn", 1.1, rotation="before"),
    ]  # fmt: skip
    found = verdict(rows, "`auto` over")
    assert found == ("missed by grag, rotated inside, flex", "1.10 x (grag, rotated inside, flex)")


def test_whole_blocks():
    def rows(ours, eager=2.0, compiled=1.5):
        return [
            timed("all", "fastrope-auto", ours, suite="block", ours=True),
            timed("plain", "diffusers", eager, suite="block"),
            timed("plain", "diffusers-compiled", compiled, suite="block"),
        ]

    eager, compiled = "diffusers' plain block", "our modulated block"
    assert verdict(rows(1.5), eager)[0] == "passed, aim met"
    assert verdict(rows(1.9), eager)[0] == "passed"
    assert verdict(rows(2.0), eager)[0] == "missed"  # not faster
    assert verdict(rows(1.5), compiled)[0] == "passed, aim met"
    assert verdict(rows(1.55), compiled)[0] == "passed"
    assert verdict(rows(1.6), compiled)[0] == "missed"
    assert verdict(rows(1.5)[1:], eager)[0] == "not measured"


def test_materialised_logits():
    rows = [
        timed("all", "fastrope-auto", 2.0, ours=True, peak_mem_mib=100.0),
        timed("all", "materialised", 30.0, peak_mem_mib=9000.0),
        timed("plain", "fastrope-auto", 2.0, ours=True, peak_mem_mib=100.0),
        timed("plain", "materialised", 12.0, peak_mem_mib=1400.0),
    ]
    assert verdict(rows, "materialised logits over `auto`: time") == ("passed", "6.00 x (plain)")
    assert verdict(rows, "materialised logits over `auto`: peak") == ("missed by plain", "14.00 x (plain)")


def test_timed_rows_are_within_the_tolerance_rule():
    right = timed("all", OURS, 2.0, max_err=0.01, max_allowed=0.02, mean_err=1e-4, mean_allowed=1.1e-4)
    assert verdict([right], "errors of timed rows")[0] == "passed, aim met"
    wrong = timed("plain", "flex", 2.0, max_err=0.03, max_allowed=0.02)
    assert verdict([right, wrong], "errors of timed rows") == (
        "missed by kontext / plain / flex", "1.50 x (kontext / plain / flex)",
    )  # fmt: skip


def test_the_latest_run_counts():
    old = timed("all", OURS, 2.0, plain_ms=1.0, date="2026-01-01T00:00:00+00:00", rev="old")
    new = timed("all", OURS, 1.1, plain_ms=1.0, date="2026-01-03T00:00:00+00:00", rev="new")
    for rows in ([old, new], [new, old]):
        (row,) = (row for row in gates.table(rows) if row["figure"].startswith("everything"))
        assert (row["verdict"], row["source"]) == ("passed, aim met", "new, 2026-01-03")
    assert "| new, 2026-01-03 |" in gates.render([old, new])
