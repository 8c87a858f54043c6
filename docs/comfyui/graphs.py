"""Writes the example workflows and the pictures of docs/comfyui.md: ``python docs/comfyui/graphs.py``.

Of each workflow in ``workflows.py``: the JSON that ComfyUI's editor opens, the JSON that its HTTP interface takes, both
into the node pack, and a picture into this folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
from workflows import CLASSES, WORKFLOWS

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "bindings" / "comfyui" / "pack" / "example_workflows"
WIDTH, LINE, HEAD, GAP = 300, 20, 30, (70, 40)
COLOURS = {
    "MODEL": (178, 157, 219), "CLIP": (255, 213, 0), "VAE": (255, 110, 110), "CONDITIONING": (255, 169, 49),
    "LATENT": (255, 156, 249), "IMAGE": (100, 181, 246), "MASK": (129, 199, 132), "FASTROPE_RECORD": (140, 220, 210),
}  # fmt: skip
TITLES = {
    "FastRoPE_GRAG": "GRAG (edit strength)", "FastRoPE_LooseRoPE": "LooseRoPE (blend a paste in)",
    "FastRoPE_UntwistingRoPE": "Untwisting RoPE (style reference)", "FastRoPE_Inspect": "Inspect attention",
    "FastRoPE_HighResolution": "High resolution (positions)", "FastRoPE_ReferenceStrength": "Reference strength",
    "FastRoPE_AttentionChart": "Attention chart", "FastRoPE_Regions": "Regions (prompts by mask)",
    "FastRoPE_NAG": "NAG (negative prompt)",
}  # fmt: skip


def sockets(kind: str) -> list[tuple[str, str]]:
    """Inputs that are linked, with their types."""
    return [(name, type_) for name, type_ in CLASSES[kind][0].items() if type_.isupper()]


def widgets(kind: str, values: dict) -> list[tuple[str, object]]:
    """Values in the order of the editor, which shows one more behind a seed, and one behind all for an upload."""
    types = {name: type_ for name, type_ in CLASSES[kind][0].items() if not type_.isupper()}
    found: list[tuple[str, object]] = []
    for name, type_ in types.items():
        found.append((name, values[name]))
        if type_ == "seed":
            found.append(("control after generate", "fixed"))
    return found + [("upload", "image")] * ("upload" in types.values())


def as_prompt(nodes: dict) -> dict:
    """What the HTTP interface takes."""
    number = {name: str(n + 1) for n, name in enumerate(nodes)}
    made = {}
    for name, (kind, values) in nodes.items():
        inputs = {key: [number[v[0]], v[1]] if isinstance(v, tuple) else v for key, v in values.items()}
        made[number[name]] = {"class_type": kind, "inputs": inputs, "_meta": {"title": TITLES.get(kind, kind)}}
    return made


def heights(nodes: dict) -> dict[str, int]:
    """Of each node, pixels."""
    return {
        name: HEAD + 12 + LINE * (max(len(sockets(kind)), len(CLASSES[kind][1])) + len(widgets(kind, values)))
        for name, (kind, values) in nodes.items()
    }


def corners(nodes: dict, places: dict) -> dict[str, tuple[int, int]]:
    """Upper left corners, of columns and rows."""
    tall = heights(nodes)
    rows = [max(tall[n] for n in nodes if places[n][1] == row) for row in range(1 + max(p[1] for p in places.values()))]
    return {
        name: (40 + places[name][0] * (WIDTH + GAP[0]), 40 + sum(rows[: places[name][1]]) + GAP[1] * places[name][1])
        for name in nodes
    }


def as_editor(nodes: dict, places: dict) -> dict:
    """What the editor opens."""
    number, at, tall = {name: n + 1 for n, name in enumerate(nodes)}, corners(nodes, places), heights(nodes)
    links, outgoing, incoming = [], {}, {}
    for name, (kind, values) in nodes.items():
        for slot, (key, type_) in enumerate(sockets(kind)):
            if key in values:
                source, output = values[key]
                links.append([len(links) + 1, number[source], output, number[name], slot, type_])
                outgoing.setdefault((source, output), []).append(len(links))
                incoming[name, key] = len(links)
    made = []
    for name, (kind, values) in nodes.items():
        made.append({
            "id": number[name], "type": kind, "pos": list(at[name]), "size": [WIDTH, tall[name]], "flags": {},
            "order": number[name] - 1, "mode": 0,
            "inputs": [{"name": key, "type": t, "link": incoming.get((name, key))} for key, t in sockets(kind)],
            "outputs": [
                {"name": t, "type": t, "links": outgoing.get((name, n), []), "slot_index": n}
                for n, t in enumerate(CLASSES[kind][1])
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [value for _, value in widgets(kind, values)],
        })  # fmt: skip
    return {
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": made, "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def draw(nodes: dict, places: dict) -> Image.Image:
    """The graph as the editor shows it, or nearly so."""
    at, tall = corners(nodes, places), heights(nodes)
    size = max(x for x, _ in at.values()) + WIDTH + 40, max(at[n][1] + tall[n] for n in nodes) + 40
    picture = Image.new("RGB", size, (32, 32, 34))
    pen = ImageDraw.Draw(picture)
    for name, (kind, _) in nodes.items():
        (x, y), ours = at[name], kind.startswith("FastRoPE")
        pen.rounded_rectangle(
            (x, y, x + WIDTH, y + tall[name]), 8, (53, 53, 58), (120, 200, 160) if ours else (20, 20, 20)
        )
        pen.rounded_rectangle((x, y, x + WIDTH, y + HEAD - 4), 8, (40, 84, 66) if ours else (44, 44, 48))
        pen.text((x + 10, y + 5), TITLES.get(kind, kind), (235, 235, 235), font_size=14)
    for name, (kind, values) in nodes.items():
        for slot, (key, type_) in enumerate(sockets(kind)):
            if key in values:
                source, output = values[key]
                start = at[source][0] + WIDTH, at[source][1] + HEAD + LINE * output + 10
                end = at[name][0], at[name][1] + HEAD + LINE * slot + 10
                _curve(pen, start, end, COLOURS[type_])
    for name, (kind, values) in nodes.items():
        _slots(pen, at[name], kind, values)
    return picture


def _slots(pen: ImageDraw.ImageDraw, corner: tuple[int, int], kind: str, values: dict) -> None:
    x, top = corner[0], corner[1] + HEAD
    for n, (name, type_) in enumerate(sockets(kind)):
        pen.ellipse(
            (x - 5, top + LINE * n + 5, x + 5, top + LINE * n + 15), COLOURS[type_] if name in values else (90, 90, 90)
        )
        pen.text((x + 12, top + LINE * n + 3), name, (200, 200, 200), font_size=12)
    for n, type_ in enumerate(CLASSES[kind][1]):
        pen.ellipse((x + WIDTH - 5, top + LINE * n + 5, x + WIDTH + 5, top + LINE * n + 15), COLOURS[type_])
        pen.text((x + WIDTH - 12, top + LINE * n + 3), type_, (200, 200, 200), font_size=12, anchor="ra")
    top += LINE * max(len(sockets(kind)), len(CLASSES[kind][1]))
    for n, (name, value) in enumerate(widgets(kind, values)):
        pen.rounded_rectangle((x + 10, top + LINE * n + 2, x + WIDTH - 10, top + LINE * (n + 1) - 1), 6, (38, 38, 41))
        pen.text((x + 18, top + LINE * n + 3), name, (150, 150, 150), font_size=12)
        text = str(value) if len(str(value)) < 28 else str(value)[:25] + "..."
        pen.text((x + WIDTH - 18, top + LINE * n + 3), text, (225, 225, 225), font_size=12, anchor="ra")


def _curve(
    pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """A Bezier curve that leaves and arrives level."""
    bend = max(60, abs(end[0] - start[0]) // 2)
    points = []
    for n in range(25):
        t = n / 24
        weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
        xs, ys = (start[0], start[0] + bend, end[0] - bend, end[0]), (start[1], start[1], end[1], end[1])
        points.append(tuple(sum(w * v for w, v in zip(weights, some, strict=True)) for some in (xs, ys)))
    pen.line(points, colour, width=3, joint="curve")


def files() -> dict[Path, bytes]:
    """What there is to write, less the pictures."""
    made = {}
    for name, (_, nodes, places) in WORKFLOWS.items():
        made[PACK / f"{name}.json"] = json.dumps(as_editor(nodes, places), indent=1).encode() + b"\n"
        made[PACK / "api" / f"{name}.json"] = json.dumps(as_prompt(nodes), indent=1).encode() + b"\n"
    return made


def main() -> None:
    """Write everything."""
    (PACK / "api").mkdir(parents=True, exist_ok=True)
    for path, content in files().items():
        path.write_bytes(content)
    for name, (_, nodes, places) in WORKFLOWS.items():
        picture = draw(nodes, places)
        picture.quantize(64).save(Path(__file__).parent / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
