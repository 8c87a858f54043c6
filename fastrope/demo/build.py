"""The demo from computation to one page.

``python -m fastrope.demo.build docs`` draws the pictures of the README again.
"""

from __future__ import annotations

import base64
import html
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import fastrope as fr

from .. import child
from ..figures import PAPERS, sheet
from ..outputs import write_picture, write_text
from . import idea, methods

FILES = ("demo.html", "idea.png", *(f"{name}.png" for name in methods.SHOWS))
LEAD = (
    "What FastRoPE's methods do to small models that were trained on handwritten digits and come with the package "
    "(16 x 16 pixels; a digit, its colour and its ground can be asked for). Nothing was chosen by hand: the rows are "
    "those of the first seeds, and below each picture stands the digit that a classifier, trained apart, takes it for."
)
IDEA = (
    "What one query (ring) attends to in a picture, computed with the real op: plain, and under each of the seven "
    "modulations that the methods are made of. Brighter is more, on a scale of each panel's own. Queries and keys are "
    "made by hand so that they prefer near keys of a similar colour."
)
PARITY = (
    "A small modulated call on every backend that can run here, against the reference in float64. Without a GPU, "
    "triton's interpreter runs the kernels."
)


def build(out: Path, device: torch.device, quick: bool) -> int:
    """Compute, draw and write everything into ``out``; the exit code of :func:`fastrope.demo.main`."""
    from tqdm import tqdm

    doctor = _ask_doctor(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small lose more to waiting threads than they gain
    count, sections = 1 if quick else 3, []
    try:
        with tqdm(total=2 + count * len(methods.SHOWS), desc="fastrope demo", unit="row") as bar:
            for name, show in methods.SHOWS.items():
                rows = []
                for row in methods.rows(name, device, count):
                    rows.append(row)
                    bar.update()
                sections.append((show.title, show.text, write_picture(out / f"{name}.png", sheet(rows))))
            sections.append(("What happens inside", IDEA, write_picture(out / "idea.png", idea.draw(device))))
            bar.update()
            checks = json.loads(doctor.communicate()[0] or "{}").get("self_check", [])
            bar.update()
    finally:
        torch.set_num_threads(threads)
        doctor.kill()
    conditions = f"device {device}, torch {torch.__version__}, fastrope {fr.__version__}, seeds from 0"
    for path in (write_text(out / "demo.html", page(sections, checks, conditions)), *(path for *_, path in sections)):
        print(path)
    return 0 if checks and all(check["passed"] for check in checks) else 1


def _ask_doctor(device: torch.device) -> subprocess.Popen:
    """Triton decides at import whether it interprets, so on a CPU the check of the kernels has its own process."""
    extra = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    code = "from fastrope.cli import main; raise SystemExit(main(['doctor', '--json']))"
    command = child.command(code, "-W", "ignore")
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **extra})


def page(sections: list[tuple[str, str, Path]], checks: list[dict], conditions: str) -> str:
    """One HTML file that holds its pictures.

    Args:
        sections: title, text, picture.
        checks: of ``fastrope doctor``.
    """
    body = [f"<h1>FastRoPE demo</h1><p>{html.escape(LEAD)}</p>"]
    for title, text, picture in sections:
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(
            f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    body.append(f"<h2>Do the backends agree?</h2><p>{html.escape(PARITY)}</p><table>")
    for check in checks:
        found = check["problem"] or f"error {check['error']:.1e}, allowed {check['allowed']:.1e}"
        cells = check["backend"], check["dtype"], "passed" if check["passed"] else "FAILED", found
        body.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    body.append(f"</table><p><small>{html.escape(conditions)}</small></p>")
    head = f'<meta charset="utf-8"><title>FastRoPE demo</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


STYLE = """
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; font: 16px/1.6 system-ui, sans-serif; }
p { max-width: 46rem; } h2 { margin-top: 2.5rem; } img { max-width: 100%; } td { padding: .1rem 1.2rem .1rem 0; }
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    _device, _folder = torch.device("cpu"), Path(sys.argv[1])
    _rows = [next(methods.rows(name, _device, 1)) for name in ("grag", "looserope")]
    for _name, _paper in PAPERS.items():
        print(write_picture(_folder / f"methods-{_name}.png", sheet(_rows, paper=_paper)))
        print(write_picture(_folder / f"idea-{_name}.png", idea.draw(_device, _paper)))
