"""``comfy_api.latest`` as far as our nodes touch it: the classes that nodes are made of.

Their arguments are those of ``comfyui_interface.json``, which ``test_comfyui_real.py`` compares with the real ones.
"""

from __future__ import annotations

import asyncio
import json
import sys
import types
from functools import partial
from pathlib import Path

RECORDED = json.loads((Path(__file__).parent / "comfyui_interface.json").read_text(encoding="utf-8"))
INPUTS, SCHEMA, OUTPUT = (RECORDED[name] for name in ("inputs", "schema", "output"))  # names that may be told


class Told:
    """Keeps what it is told, of what may be told."""

    def __init__(self, kind: str, allowed: list[str], *args, **kwargs):
        names = allowed
        told = dict(zip(names, args, strict=False)) | kwargs
        unknown = told.keys() - set(allowed)
        assert not unknown, f"{kind} takes no {unknown}"
        self.kind = kind
        self.__dict__.update(dict.fromkeys(allowed) | told)


def _type(name: str, inputs: list[str]):
    made = type(name, (), {})
    made.Input = partial(Told, name, inputs)
    made.Output = partial(Told, name, OUTPUT)
    return made


class ComfyNode:
    """Base of nodes."""


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


class ComfyExtension:
    """Base of node packs."""


def install(monkeypatch) -> None:
    """``comfy_api.latest`` for the time of a test."""
    io = types.SimpleNamespace(ComfyNode=ComfyNode, NodeOutput=NodeOutput, Schema=partial(Told, "Schema", SCHEMA))
    io.Custom = lambda name: _type(name, INPUTS["Model"])
    for name, allowed in INPUTS.items():
        setattr(io, name, _type(name, allowed))
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, ComfyExtension
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    for name in [name for name in sys.modules if name.startswith("fastrope.bindings.comfyui.")]:
        if any(part in name for part in (".nodes", ".inputs")):
            monkeypatch.delitem(sys.modules, name)


def node_classes(monkeypatch) -> dict:
    """Our nodes by their ids, made of these classes."""
    install(monkeypatch)
    from fastrope.bindings.comfyui.nodes import comfy_entrypoint

    return {node.define_schema().node_id: node for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())}


def run_node(node, model, **values):
    """A node with the defaults of its schema, in the order of its parameters."""
    defaults = {each.id: getattr(each, "default", None) for each in node.define_schema().inputs}
    return node.execute(model=model, **{name: x for name, x in {**defaults, **values}.items() if x is not None})
