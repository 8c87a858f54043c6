"""The API reference: it builds strictly, holds every public name, and no docstring refers to what is not there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, module_name, sources

import fastrope

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`<>]+)`")
OUTSIDE = ("torch", "diffusers", "transformers")


def dev():
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_builds_without_a_warning_and_names_all(tmp_path):
    for tool in ("pdoc", "diffusers", "transformers"):
        pytest.importorskip(tool)
    script = dev()
    command = [sys.executable, *script.STRICT, "-m", "pdoc", *script.PDOC, "-o", str(tmp_path), *script.DOCUMENTED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    front = (tmp_path / "fastrope.html").read_text(encoding="utf-8")
    assert not [name for name in fastrope.__all__ if f'id="{name}"' not in front]
    pages = {str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.html")}
    assert pages >= {"fastrope/methods", "fastrope/bindings/diffusers", "fastrope/bindings/llamagen"}
    assert not [page for page in tmp_path.rglob("*.html") if ROLE.search(page.read_text(encoding="utf-8"))]


def docstrings(path: Path):
    """Docstrings of a file, each with the class it is in, if any."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or "", node.name if isinstance(node, ast.ClassDef) else owner.get(node)


def resolves(target: str, path: Path, owner: str | None) -> bool:
    """Whether a reference names something: absolute, or of the package, the module or the class it stands in."""
    home = module_name(path)
    package = home if path.name == "__init__.py" else home.rpartition(".")[0]
    if target.startswith("."):
        target = importlib.util.resolve_name(target, package)
    places = [target, f"{package}.{target}", f"{home}.{target}", f"{home}.{owner}.{target}"]
    return target.partition(".")[0] in OUTSIDE or any(map(found, places))


def found(dotted: str) -> bool:
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            fields = getattr(value, "__dataclass_fields__", {}) | getattr(value, "__annotations__", {})
            if not hasattr(value, part):
                return part in fields
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("folder", ["fastrope", "kernels", "bindings"])
def test_references_in_docstrings_lead_somewhere(folder):
    for host in ("diffusers", "transformers"):
        pytest.importorskip(host)
    lost = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in sources(folder)
        for text, owner in docstrings(path)
        for target in ROLE.findall(text)
        if not resolves(target.rstrip("()"), path, owner)
    ]
    assert not lost
