"""The import contract: who may import whom, what is imported late and why, and no circles anywhere."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from source_tree import FOLDERS, ROOT, module_name, run_python, sources

WITHOUT_TRITON = [f"fastrope.kernels.{name}" for name in ("abi", "config", "streams", "tables")]
HOSTS = ("diffusers", "transformers", "comfy", "comfy_api", "matplotlib", "PIL")


def statements(path: Path, lazy: bool) -> Iterator[tuple[str, list[str]]]:
    """What each import of a file names, absolute and dotted: a module, and what is taken from it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree) if lazy else eager_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield base, [f"{base}.{alias.name}" for alias in node.names]


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Dotted names a file imports; without ``lazy`` only those imported when the module is."""
    for module, members in statements(path, lazy):
        yield from (module, *members)


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


@pytest.mark.parametrize("path", sources("kernels"), ids=module_name)
def test_kernels_import_torch_and_triton_and_nothing_of_ours(path):
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in {"torch", "triton"} or top in sys.stdlib_module_names or within(name, "fastrope.kernels")
        assert allowed, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", sources("fastrope"), ids=module_name)
def test_the_package_imports_kernels_hosts_and_bindings_lazily(path):
    forbidden = ["triton", "fastrope.bindings", "fastrope.demo", "fastrope.bench"]
    if within(module_name(path), "fastrope.demo"):  # nothing imports it but the command line, on demand
        forbidden = forbidden[:2]
    else:
        forbidden += HOSTS
    for name in imports(path, lazy=False):
        assert not within(name, *forbidden), f"{module_name(path)} imports {name} at import"
        if within(name, "fastrope.kernels"):
            allowed = name == "fastrope.kernels" or within(name, *WITHOUT_TRITON)
            assert allowed, f"{module_name(path)} imports {name} at import"


@pytest.mark.parametrize("name", WITHOUT_TRITON)
def test_what_plans_share_with_kernels_needs_no_triton(name):
    found = set(imports(ROOT / "kernels" / f"{name.rpartition('.')[2]}.py", lazy=False))
    assert not any(within(x, "triton") for x in found)
    ours = {x for x in found if within(x, "fastrope")} - {"fastrope.kernels"}
    assert all(within(x, *WITHOUT_TRITON) for x in ours)


@pytest.mark.parametrize("path", sources("fastrope"), ids=module_name)
def test_nothing_imports_bindings_but_apply_and_the_commands(path):
    if module_name(path) == "fastrope" or within(module_name(path), "fastrope.commands", "fastrope.lab"):
        return
    for name in imports(path):
        assert not within(name, "fastrope.bindings"), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", sources("bindings"), ids=module_name)
def test_bindings_do_not_reach_past_the_package(path):
    for name in imports(path):
        assert not within(name, "fastrope.kernels", "triton"), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", [*(ROOT / "bindings" / "image").glob("*.py")], ids=module_name)
def test_what_hosts_of_images_share_knows_none_of_them(path):
    for name in imports(path):
        known = not within(name, "fastrope.bindings", *HOSTS[:4]) or within(name, "fastrope.bindings.image")
        assert known, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", [*(ROOT / "bindings" / "comfyui").glob("*.py")], ids=module_name)
def test_comfyui_is_imported_by_its_nodes_alone(path):
    """And only its public interface: all else is handed over by the host."""
    for name in imports(path):
        nodes = path.stem.startswith("nodes") or path.stem == "inputs"
        forbidden = ("comfy", "diffusers") if nodes else ("comfy", "diffusers", "comfy_api")
        assert not within(name, *forbidden), f"{module_name(path)} imports {name}"


def test_the_contract_sees_what_it_must_see(tmp_path):
    """The checks above are only as good as the import finder."""
    path = ROOT / "fastrope" / "planning" / "lowered.py"
    assert "fastrope.kernels.tables.Polynomial" in set(imports(path, lazy=False))
    lazy = ROOT / "fastrope" / "__init__.py"
    assert set(imports(lazy)) > set(imports(lazy, lazy=False))


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
    assert set(packages.split()) <= {"fastrope", "numpy", "torch"}
    assert int(count) < 100
    assert "not triton: triton is not installed" in "\n".join(report)


def test_our_kernels_are_not_a_top_level_module():
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    assert not any(str(ROOT) in place for place in places)


# ---- circles and late imports ---------------------------------------------------------------------------------------

# Imports inside functions, or for type checkers alone: who, whom, and why not at the top of the file.
LATE = {
    ("fastrope", "fastrope.bindings*"): "apply, remove, steer and prepare_reference need a host library, an extra",
    ("fastrope.bindings.diffusers.steering", "fastrope.bindings.transformers.judge"): "transformers is another extra",
    ("fastrope.commands.*", "fastrope.bindings.*"): "a command line is parsed without the extra it names as missing",
    ("fastrope.commands.*", "fastrope.lab*"): "the same",
    ("fastrope.demo", "fastrope.demo.build"): "the same, for pictures",
    ("fastrope.bench", "fastrope.bench.*"): "the same, for pictures and peers",
    ("fastrope.commands.evidence", "fastrope.lab.*"): "the same, for hosts",
    ("fastrope.lab.*", "fastrope.bindings.*"): "hosts are extras",
    ("fastrope.doctor", "fastrope.bench.first_run"): "the benchmark is no part of the library",
    ("fastrope.bench.host", "fastrope.kernels.launch"): "triton need not be installed where its tables are made",
    ("fastrope.bench.run", "fastrope.cli"): "a clone that is not installed is made importable before",
}
FRONT_DOOR = ("fastrope", "fastrope.bindings")  # the one pair that import each other: apply and its kin, when called
OPTIONAL = {"PIL", "diffusers", "huggingface_hub", "matplotlib", "peft", "safetensors", "sklearn", "torchvision",
            "tqdm", "transformers", "triton"}  # fmt: skip
MODULES = {module_name(path): path for folder in FOLDERS for path in sources(folder)}


def dependencies(name: str, lazy: bool = True) -> set[str]:
    """Modules of ours that a module imports, or imports something from."""
    found = set()
    for module, members in statements(MODULES[name], lazy):
        found |= {member if member in MODULES else module for member in members} or {module}
    return (found & MODULES.keys()) - {name}


def test_nothing_imports_in_a_circle():
    """Late imports and those for type checkers count: a circle is a design to mend, wherever it is closed."""
    graph = {name: dependencies(name) for name in MODULES}
    graph["fastrope"] = {x for x in graph["fastrope"] if not within(x, FRONT_DOOR[1])}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", MODULES)
def test_late_imports_have_a_reason(name):
    for imported in dependencies(name) - dependencies(name, lazy=False):
        allowed = any(fnmatch(name, who) and fnmatch(imported, whom) for who, whom in LATE)
        assert allowed, f"{name} imports {imported} late: at the top, or with its reason into LATE"


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, "fastrope.bench")])
def test_only_optional_packages_are_imported_late(name):
    """The bench imports its peers late, whatever they are."""
    early, late = (({x.partition(".")[0] for x, _ in statements(MODULES[name], lazy)}) for lazy in (False, True))
    assert late - early - {"fastrope"} <= OPTIONAL


def test_islock_is_closed():
    """It samples tokens and touches no attention: it knows nothing of that, and others come in by its front door."""
    inside = {name for name in MODULES if within(name, "fastrope.islock")}
    shared = {"fastrope.checks", "fastrope.device", "fastrope.kernels", "fastrope.verification"}
    for name in MODULES:
        crossed = {x for x in dependencies(name) if (x in inside) != (name in inside)}
        assert crossed <= (shared if name in inside else {"fastrope.islock"}), f"{name} imports {sorted(crossed)}"


def test_every_reason_for_late_imports_is_needed():
    late = [(name, x) for name in MODULES for x in dependencies(name) - dependencies(name, lazy=False)]
    for who, whom in LATE:
        assert any(fnmatch(name, who) and fnmatch(x, whom) for name, x in late), f"{who} imports no {whom} late"
