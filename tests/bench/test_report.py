"""Tables, pictures and the figures of docs/backends.md come from rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_rows import a_row, timed

from fastrope import bench
from fastrope.bench import page, report
from fastrope.bench.rows import RESULTS, read

ROOT = Path(__file__).resolve().parents[2]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_report_needs_rows_and_nothing_else():
    rows = [
        a_row(ms_median=9.0, date="2026-01-01T00:00:00+00:00"), a_row(),
        a_row(case="grag", ms_median=3.0), a_row(case="grag", impl="two", ms_median=2.5),
        a_row(case="bands", ms_median=3.0, plain_ms=2.5),
    ]  # fmt: skip
    text = report.render([json.loads(json.dumps(row)) for row in rows])
    assert "### attention: kontext, bfloat16, Accelerator 9" in text
    assert "9.000" not in text  # an older row of the same contestant
    grag = [line for line in text.splitlines() if line.startswith("| grag")]
    assert [line.split(" | ")[1] for line in grag] == ["two", "one"]  # the fastest first
    assert "| 1.50 |" in grag[1]
    assert "|  |" in grag[0]  # no plain row of its own to compare with
    assert "| 1.20 |" in next(line for line in text.splitlines() if line.startswith("| bands"))  # of the same rounds
    assert "k/1" in text
    assert report.render([]) == ""


def test_rows_of_every_suite_are_reported():
    """Whatever a suite does not measure is null."""
    nothing = dict.fromkeys(("tflops", "peak_pct", "peak_mem_mib", "max_err", "mean_err", "kernel"))
    match = a_row(suite="match", share=0.0123, **nothing)
    text = report.render([match, a_row(suite="kontext", case="GRAG", launches=3, x_stock=1.04, **nothing)])
    assert "### match: kontext" in text
    assert "| 1.2% |" in text
    assert "| 1.04 |" in text
    assert "TFLOP/s |" not in text  # a column that nobody fills
    assert "| launches |" in text


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(a_row()) + "\n" + json.dumps({"workload": "kontext"}) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: expected a row with case, impl"):
        read(path)
    path.write_text(json.dumps(a_row()) + "\n{half")
    with pytest.raises(ValueError, match="rows.jsonl:2: expected a row of JSON, received '{half'"):
        read(path)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_written_from_the_rows_of_this_repository():
    rows = [row for path in sorted((ROOT / RESULTS).glob("*/*.jsonl")) for row in read(path)]
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    between = text.partition(page.START)[2].partition(page.END)[0]
    assert between.strip() == page.part(rows).strip(), "run: fastrope bench --report --page docs/backends.md"


def test_without_rows_of_a_gpu_it_says_so():
    assert "No figure of speed" in page.part([])
    assert page.part([a_row(gpu="cpu")]) == page.NOTHING


def test_the_pages_table_compares_like_with_like():
    rows = [
        timed("plain", "fastrope-auto", 2.0, ours=True), timed("plain", "careful-cudnn", 2.5),
        timed("plain", "cudnn", 1.0, rotation="before"), timed("plain", "flex", 4.0),
        timed("all", "fastrope-auto", 2.4, ours=True, plain_ms=2.0, rev="def"),
        timed("all", "materialised", 99.0, date="2025-01-01T00:00:00+00:00"),
    ]  # fmt: skip
    text = page.part(rows)
    plain, together = (next(x for x in text.splitlines() if x.startswith(f"| {case} ")) for case in ("plain", "all"))
    assert "careful-cudnn | 2.500 | 1.25 x" in plain  # neither the slower one nor one that does not rotate
    assert "1.20 x" in together
    assert "99.0" not in text  # of another run
    assert "revision abc, def" in text
    assert "### Bars" in text
    assert plain.endswith("| abc |")
    assert together.endswith("| def |")  # a case of another revision shows


def test_the_page_has_the_blocks_of_the_latest_run():
    block = dict(suite="block", date="2026-02-02T00:00:00+00:00")
    rows = [
        timed("all", "fastrope-auto", 1.7, ours=True, **block), timed("plain", "diffusers", 2.8, **block),
        timed("plain", "diffusers-compiled", 1.6, **block), timed("plain", "cudnn-alone", 1.3, **block),
        timed("grag", "fastrope-auto", 9.9, ours=True, suite="block"),
    ]  # fmt: skip
    lines = [
        line.split(" | ")[:3] for line in page.part(rows).splitlines() if line.startswith(("| all |", "| plain |"))
    ]
    assert lines == [
        ["| all", "fastrope-auto", "1.700"], ["| plain", "diffusers", "2.800"],
        ["| plain", "diffusers-compiled", "1.600"],
    ]  # fmt: skip
    assert "9.900" not in page.part(rows)  # of an earlier run
    assert "revision" in page.part(rows)


def test_only_what_is_between_the_markers_is_written(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    page.write(path, [])
    assert path.read_text() == f"before\n{page.START}\n\n{page.NOTHING}\n\n{page.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="page.md: expected the lines"):
        page.write(path, [])


def test_the_command_writes_the_page_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / RESULTS / "nvidia-h200"
    folder.mkdir(parents=True)
    rows = [timed("plain", "fastrope-auto", 2.0, ours=True), timed("all", "flex", 3.0), timed("all", "two", 1e-3)]
    (folder / "attention.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "match.jsonl").write_text(json.dumps(timed("c", "i", 1.0, suite="match")) + "\n")
    Path("page.md").write_text(f"{page.START}\n{page.END}\n")
    assert bench.main(["--report", "--page", "page.md", "--plots", "pictures"]) == 0
    assert "1 x 8704 x 24 x 128" in Path("page.md").read_text()
    (picture,) = Path("pictures").iterdir()
    assert picture.name == "nvidia-h200-attention-kontext-bfloat16.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "### Bars" in printed
    assert "### match: kontext" in printed
