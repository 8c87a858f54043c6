"""README.md: its snippets run and print what it shows, its links lead somewhere, its status is true."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, offline_kontext, run_snippets, snippets

from fastrope import device as devices
from fastrope.bench.names import AUTO, STOCK, STOCK_COMPILED
from fastrope.bench.rows import latest, read
from fastrope.kernels import config

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)|(?:src|srcset)=\"([^\"]+)\"")


def test_snippets_run(tmp_path, monkeypatch, capsys):
    pipe = offline_kontext(monkeypatch, tmp_path)
    monkeypatch.setattr(devices, "interpreted", lambda: False)  # as for a reader with a CPU
    processors = dict(pipe.transformer.attn_processors)
    found = run_snippets(README, capsys)
    assert pipe.transformer.attn_processors == processors
    assert found["before"].tobytes() != found["after"].tobytes()
    assert found["out"].shape == (1, len(found["tokens"]), 4, 128)


def test_it_is_short_and_its_status_stands_first():
    assert TEXT.count("\n") <= 180
    assert TEXT[: TEXT.index("```")].count("\n") < 20
    assert "**Status: alpha.**" in TEXT[: TEXT.index("```")]


def test_the_status_is_true():
    stated = " ".join(TEXT[: TEXT.index("```")].split())
    archs = [f"`{arch}`" for arch in config.ARCHS]
    assert f"for {', '.join(archs[:-1])} and {archs[-1]}." in stated
    rows = [row for path in (ROOT / "bench" / "results").glob("*/*.jsonl") for row in read(path)]
    measured = [row for row in rows if row["gpu"] != "cpu"]
    assert ("Nothing has run on a GPU yet." in stated) == (not measured)


def test_the_figures_of_the_status_are_the_rows():
    rows = read(ROOT / "bench" / "results" / "nvidia-h200" / "block.jsonl")
    ours, stock, compiled = (
        latest(rows)["NVIDIA H200", "bfloat16", "block", "kontext", case, impl]
        for case, impl in (("all", AUTO), ("plain", STOCK), ("plain", STOCK_COMPILED))
    )
    stated = " ".join(TEXT[: TEXT.index("```")].split())
    torch, triton = (ours[name].rpartition(".")[0] for name in ("torch", "triton"))
    assert f"(1024 px, bfloat16, torch {torch}, triton {triton}, {ours['date'][:10]}) with four modulations" in stated
    assert (
        f"took {ours['ms_median']:.2f} ms, diffusers' plain one {stock['ms_median']:.2f} ms, compiled "
        f"{compiled['ms_median']:.2f} ms" in stated
    )


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor, picture in LINK.findall(path.read_text(encoding="utf-8")):
        target = target or picture
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{path.name} links to {target}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    for path in PAGES[1:]:
        assert f"({path.relative_to(ROOT).as_posix()})" in TEXT


def test_snippets_are_found_with_their_lines_and_what_they_print():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python title\nz = 3\n```\n\n```text\n3\n```\n"
    assert snippets(text) == [("\n\nx = 1\n", None), ("\n" * 8 + "z = 3\n", "3\n")]
