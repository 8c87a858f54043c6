"""The page of the evidence and its pictures, from stored findings and nothing else."""

from __future__ import annotations

import textwrap
from collections import Counter
from importlib import import_module
from pathlib import Path

from .findings import Findings, digest

PARTS = ("editor", "grag", "untwisting", "looserope", "attention", "author", "islock")
PAGE, FOLDER = "evidence.md", "evidence"
SIZE = {"attention": (10, 8.4)}  # of pictures in inches, where it is another than 10 x 4.2
DPI = 110

HEAD = """# Evidence: what the methods do on trained models

A package cannot ship published models, but it can train small ones. `fastrope.lab` holds three that this project
trained on handwritten digits ([how](../fastrope/lab/README.md)): a FLUX-shaped editor and a LlamaGen-shaped
autoregressive model, of about a million weights each, and a classifier that judges their pictures. On these models
four methods run through the public interface, and their effects are counted. **These are not published models.**
Pictures have 16 x 16 pixels and 8 x 8 tokens, so the best values of dials differ from those for 64 x 64 tokens. The
numbers show whether there is an effect, in which direction, and how large it is compared with the noise. The dials are
those of the methods' pages: [GRAG](grag.md), [Untwisting RoPE](untwisting.md), [LooseRoPE](looserope.md),
[ISLock](islock.md).

`fastrope evidence` measures all of it again; `--quick` takes fewer samples. This page is generated from the numbers in
[evidence/](evidence), which has one file per section with the outcome of every sample (of attention, means over
samples); a test checks that they agree. Square brackets are 95 % bootstrap intervals over samples. The pictures of
digits are held out from training. The combinations of words are held out where the editor draws from a full prompt,
keeps or blends; most other edits name combinations that training may have drawn. Every setting of a dial gets the same
samples and the same noise, but for `fr.steer`, which draws its own. *True guidance* is
classifier-free guidance by a negative prompt, the pipeline's `true_cfg_scale`."""


def module(part: str):
    """The module of a section."""
    return import_module(f"{__package__}.{part}")


def text(folder: Path) -> str:
    """The page for the findings stored in ``folder``, as Markdown."""
    sections = [HEAD]
    for part in PARTS:
        path = folder / f"{part}.json"
        if path.exists():
            found = Findings.load(path)
            sections += [module(part).text(found), _picture(part, found), _conditions(part, found)]
    blocks = "\n\n".join(filter(None, sections)).split("\n\n")
    return "\n\n".join(map(_flow, blocks)) + "\n"


def _flow(block: str) -> str:
    """A paragraph in lines of one length; tables, headings, lists and pictures as they are."""
    if block.startswith(("|", "#", "* ", "!")):
        return block
    text = " ".join(block.split()).replace(" %", "\N{NO-BREAK SPACE}%")  # which textwrap does not break at
    return textwrap.fill(text, 120, break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " ")


def write(out: Path) -> list[Path]:
    """Write ``evidence.md`` and the pictures beside the numbers in ``out / "evidence"``."""
    folder = out / FOLDER
    page = out / PAGE
    page.write_text(text(folder), encoding="utf-8")
    return [page, *(draw(folder, part) for part in PARTS if (folder / f"{part}.json").exists() and _drawn(part))]


def draw(folder: Path, part: str) -> Path:
    """The picture of a section; it names the digest of the numbers it shows."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers, path = folder / f"{part}.json", folder / f"{part}.png"
    settings = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#d9dee4",
        "axes.axisbelow": True, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
        "legend.frameon": False, "legend.fontsize": 8,
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=SIZE.get(part, (10, 4.2)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        module(part).draw(Findings.load(numbers), figure)
        figure.savefig(path, metadata={"Source": digest(numbers)})
    return path


def _drawn(part: str) -> bool:
    return hasattr(module(part), "draw")


def _picture(part: str, found: Findings) -> str:
    return f"![{module(part).CAPTION}]({FOLDER}/{part}.png)" if _drawn(part) else ""


def _conditions(part: str, found: Findings) -> str:
    made = found.made
    samples = Counter(len(values) for row in found.rows for values in row.outcomes.values())
    count = getattr(module(part), "SAMPLES", samples.most_common(1)[0][0])
    steps = f"{made['steps']} steps, " if "editor" in module(part).USES else ""
    return f"*n = {count}. {steps}CPU, float32, torch {made['torch']}. Measured in {made['seconds']} s.*"
