"""The import contract, what an installation holds, and validation that survives ``python -O``."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastrope

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"kernels": "fastrope.kernels", "bindings": "fastrope.bindings", "fastrope": "fastrope"}
HOSTS = ("diffusers", "transformers", "matplotlib", "PIL")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Absolute dotted names a file imports; without ``lazy`` only those imported when the module is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree) if lazy else eager_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def eager_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: no function bodies, no ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from eager_nodes(child)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def run_python(code: str, *flags: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- import contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources("kernels"), ids=module_name)
def test_kernels_import_torch_and_triton_and_nothing_of_ours(path):
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in {"torch", "triton"} or top in sys.stdlib_module_names or within(name, "fastrope.kernels")
        assert allowed, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", sources("fastrope"), ids=module_name)
def test_the_package_imports_kernels_hosts_and_bindings_lazily(path):
    forbidden = ["triton", "fastrope.kernels", "fastrope.bindings", "fastrope.demo", "fastrope.bench"]
    if within(module_name(path), "fastrope.demo"):  # nothing imports it but the command line, on demand
        forbidden = forbidden[:3]
    else:
        forbidden += HOSTS
    for name in imports(path, lazy=False):
        assert not within(name, *forbidden), f"{module_name(path)} imports {name} at import"


@pytest.mark.parametrize("path", sources("fastrope"), ids=module_name)
def test_nothing_imports_bindings_but_apply_and_the_commands(path):
    if module_name(path) == "fastrope" or within(module_name(path), "fastrope.commands", "fastrope.lab"):
        return
    for name in imports(path):
        assert not within(name, "fastrope.bindings"), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", sources("fastrope") + sources("bindings"), ids=module_name)
def test_nothing_imports_the_lab_but_demo_and_commands(path):
    if not within(module_name(path), "fastrope.lab", "fastrope.demo", "fastrope.commands", "fastrope.cli"):
        for name in imports(path):
            assert not within(name, "fastrope.lab"), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", sources("bindings"), ids=module_name)
def test_bindings_do_not_reach_past_the_package(path):
    for name in imports(path):
        assert not within(name, "fastrope.kernels", "triton"), f"{module_name(path)} imports {name}"


def test_the_contract_sees_what_it_must_see(tmp_path):
    """The checks above are only as good as the import finder."""
    path = ROOT / "fastrope" / "backends" / "triton.py"
    assert "fastrope.kernels.config" in set(imports(path))
    assert "fastrope.kernels.config" not in set(imports(path, lazy=False))
    assert "fastrope.planning.Plan" in set(imports(path, lazy=False))


def test_import_needs_no_triton_and_drags_in_no_host():
    code = """
import sys
sys.modules["triton"] = None  # what an installation without it looks like
import torch
before = set(sys.modules)
import fastrope
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(len(set(sys.modules) - before))
x = torch.randn(1, 8, 2, 16)
assert fastrope.attention(x, x, x).shape == x.shape
print(fastrope.explain(x, x, x))
"""
    packages, count, *report = run_python(code).splitlines()
    assert set(packages.split()) <= {"fastrope", "numpy"}
    assert int(count) < 100
    assert "not triton: triton is not installed" in "\n".join(report)


def test_our_kernels_are_not_a_top_level_module():
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    assert not any(str(ROOT) in place for place in places)


# ---- installation ---------------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy: the build leaves its own folders behind, and stale ones leak into wheels
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    folders = [f for f in ("fastrope", "kernels", "bindings", "bench") if (ROOT / f).is_dir()]
    for folder in folders:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [sys.executable, *build, "-w", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
        entry_points = archive.read(f"fastrope-{fastrope.__version__}.dist-info/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {"fastrope", f"fastrope-{fastrope.__version__}.dist-info"}
    assert "fastrope = fastrope.cli:main" in entry_points
    assert f"fastrope-{fastrope.__version__}.dist-info/licenses/LICENSE" in names
    for folder, package in PACKAGES.items():
        for path in sources(folder):
            expected = "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
            assert expected in names, f"{expected} is not in the wheel: list its package in pyproject.toml"
    assert "fastrope/lab/weights/digits.safetensors" in names
    code = """
import importlib.util, sys, fastrope
for name in ("fastrope", "fastrope.kernels", "fastrope.bindings", "fastrope.bindings.diffusers"):
    print(importlib.util.find_spec(name).origin)
"""
    found = run_python(code, env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}, cwd=tmp_path).splitlines()
    assert all(str(tmp_path / "installed") in origin for origin in found), found


# ---- python -O ------------------------------------------------------------------------------------------------------


def test_validation_survives_optimised_mode():
    code = """
import torch, fastrope as fr
assert False, "assertions are off"
q = torch.randn(1, 8, 2, 16)
rope = fr.RoPE(torch.zeros(8, 8))
ones = torch.ones(8)
calls = {
    "q": lambda: fr.attention(q[0], q, q),
    "k": lambda: fr.attention(q, q[..., :8], q),
    "v": lambda: fr.attention(q, q, q.double()),
    "backend": lambda: fr.attention(q, q, q, backend="fast"),
    "scale": lambda: fr.attention(q, q, q, scale=float("nan")),
    "key_mask": lambda: fr.attention(q, q, q, key_mask=torch.ones(1, 8)),
    "RoPE.pairing": lambda: fr.RoPE(torch.zeros(8, 8), pairing="odd"),
    "QueryScale.scale": lambda: fr.attention(q, q, q, rope=rope, modulations=[fr.QueryScale(torch.ones(7))]),
    "BandWeight.weight": lambda: fr.attention(q, q, q, rope=rope, modulations=[fr.BandWeight(torch.ones(7))]),
    "LogitGain.gain": lambda: fr.attention(q, q, q, modulations=[fr.LogitGain(torch.ones(7))]),
    "BiasDelta.keys": lambda: fr.attention(q, q, q, modulations=[fr.BiasDelta(keys=slice(0, 5)), fr.BiasDelta()]),
    "debug q": lambda: fr.attention(q * float("nan"), q, q, debug=True),
}
for argument, call in calls.items():
    try:
        call()
    except ValueError as error:
        if argument.split()[-1] not in str(error):
            raise
    else:
        raise SystemExit(f"{argument}: no error")
"""
    run_python(code, "-O")


# ---- style ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
