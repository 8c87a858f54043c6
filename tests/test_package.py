"""What an installation holds and asks for, validation that survives ``python -O``, and style."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from source_tree import FOLDERS, ROOT, run_python, sources

import fastrope
from fastrope import extras

# ---- extras ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "call"),
    [
        ("diffusers", "fastrope.apply(None)"),
        ("diffusers", "fastrope.remove(None)"),
        ("diffusers", "fastrope.steer(None, fastrope.GRAG())"),
        ("diffusers", "fastrope.prepare_reference(None)"),
        ("diffusers", "import fastrope.bindings.diffusers"),
        ("transformers", "import fastrope.bindings.transformers.janus"),
        ("transformers", "from fastrope.bindings.llamagen import encode_prompts; encode_prompts('a cat')"),
    ],
)
def test_without_its_host_every_entry_names_the_extra(host, call, tmp_path):
    code = f"""
import sys
sys.modules[{host!r}] = None  # what an installation without it looks like
import fastrope
try:
    {call}
except ImportError as error:
    print(error)
"""
    said = run_python(code, cwd=tmp_path)  # elsewhere, so that the clone's folders do not come first
    assert said.splitlines()[-1] == f'{host} is not installed: pip install "fastrope[{host}]"'


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from diffusers import Flux9", r"diffusers \d+\.\S+ is installed, another version is needed \(.*Flux9"),
        ("import diffusers.flux9", r"diffusers \d+\.\S+ is installed, another version is needed \(.*flux9"),
        ("import nobody", "nobody is not installed"),
    ],
)
def test_another_version_and_a_missing_dependency_are_named(code, said):
    import diffusers  # noqa: F401  (the version is read from the imported package)

    advice = r': pip install "fastrope\[diffusers\]"$'
    with pytest.raises(extras.MissingExtra, match=said + ".*" + advice), extras.importing("diffusers"):
        exec(code)


def test_a_fault_of_ours_is_not_mistaken_for_a_missing_extra():
    with pytest.raises(ImportError, match="nothing") as caught, extras.importing("diffusers"):
        from fastrope.rope import nothing  # noqa: F401
    assert not isinstance(caught.value, extras.MissingExtra)


def test_one_extra_brings_what_is_missing():
    assert extras.install(["transformers", "diffusers"]) == 'pip install "fastrope[diffusers,transformers]"'
    assert extras.install(["diffusers", "tqdm"]) == 'pip install "fastrope[demo]"'


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
    assert wheel.stat().st_size < 12e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
        entry_points = archive.read(f"fastrope-{fastrope.__version__}.dist-info/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {"fastrope", f"fastrope-{fastrope.__version__}.dist-info"}
    assert "fastrope = fastrope.cli:main" in entry_points
    assert f"fastrope-{fastrope.__version__}.dist-info/licenses/LICENSE" in names
    for folder, package in FOLDERS.items():
        for path in sources(folder):
            expected = "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
            assert expected in names, f"{expected} is not in the wheel: list its package in pyproject.toml"
    assert "fastrope/py.typed" in names
    weights = {path.name for path in (ROOT / "fastrope" / "lab" / "weights").iterdir()}
    assert {f"fastrope/lab/weights/{name}" for name in weights} <= set(names)
    assert not [name for name in names if name.endswith((".pt", ".pth", ".pkl", ".bin"))]
    code = """
import importlib.util, sys, fastrope
for name in ("fastrope", "fastrope.kernels", "fastrope.bindings", "fastrope.bindings.diffusers"):
    print(importlib.util.find_spec(name).origin)
"""
    found = run_python(code, env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}, cwd=tmp_path).splitlines()
    assert all(str(tmp_path / "installed") in origin for origin in found), found


PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # as text: Python 3.10 cannot parse it
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
MINIMA = {name: Version(least) for name, least in re.findall(r"""["']([a-z-]+)>=([\d.]+)""", PYPROJECT)}
UNREACHED = "Failed to fetch|error sending request|timed out|not found in the (package registry|cache)"
HEAVY = ("torch", "triton", "triton-windows", "diffusers", "transformers")  # whose minima were tried


def test_every_place_names_the_same_versions():
    first, last = PYTHONS[0], PYTHONS[-1]
    assert [f"3.{minor}" for minor in range(int(first[2:]), int(last[2:]) + 1)] == PYTHONS
    assert f'requires-python = ">={first}"' in PYPROJECT  # an upper bound would stop pip on the next Python
    readme, dev = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "dev.py"))
    assert readme.count(f"Python {first} to {last}") == 2
    assert f"Python {first} - {last}" in dev
    assert f"PYTHONS = ({tuple(map(int, first.split('.')))}, {tuple(map(int, last.split('.')))})" in dev
    for name in ("torch", "triton", "diffusers", "transformers"):
        assert f"{name} >= {MINIMA[name]}" in readme


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "system", "versions"),
    [
        *((python, "linux", "lowest-direct") for python in PYTHONS),
        *((python, "windows", "lowest-direct") for python in (PYTHONS[0], PYTHONS[-1])),
        *((python, "linux", "highest") for python in (PYTHONS[0], PYTHONS[-1])),
        (PYTHONS[-1], "windows", "highest"), (PYTHONS[-1], "macos", "highest"),
    ],
)  # fmt: skip
def test_versions_go_together(python, system, versions):
    """All extras at once, by the metadata of wheels in a registry; nothing is installed."""
    uv = pytest.importorskip("uv")
    command = [uv.find_uv_bin(), "pip", "compile", str(ROOT / "pyproject.toml"), "--all-extras", "--no-header"]
    command += ["--python-version", python, "--python-platform", system, "--resolution", versions]
    command += ["--only-binary", ":all:", "--no-annotate", "--no-python-downloads", "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    unreached = re.search(UNREACHED, done.stderr)
    if done.returncode and unreached:
        pytest.skip(f"no registry of packages is reached: {unreached[0]}")
    assert done.returncode == 0, done.stderr
    found = {name: Version(number) for name, number in re.findall(r"^([\w-]+)==([\d.]*\d)", done.stdout, re.MULTILINE)}
    brought = {"linux": ["triton"], "windows": ["triton-windows"], "macos": []}[system]
    assert [name for name in found if name.startswith("triton")] == brought
    assert all(found[name] >= MINIMA[name] for name in found.keys() & MINIMA.keys())
    if versions == "lowest-direct":  # a stated minimum that nothing can have is none
        assert {n: found[n] for n in HEAVY if n in found} == {n: MINIMA[n] for n in HEAVY if n in found}


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


def test_commits_are_checked_by_the_ruff_of_the_tests():
    """And the hooks are those of the tests: a commit that they pass is one that the tests pass."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (revision,) = re.findall(r"ruff-pre-commit\n +rev: v([\d.]+)", hooks)
    (wanted,) = re.findall(r'"ruff([~=<>\d., ]+)"', PYPROJECT)
    assert Version(revision) in SpecifierSet(wanted)
    ids = re.findall(r"- id: ([\w-]+)", hooks)
    assert {"ruff-check", "ruff-format", "end-of-file-fixer", "check-added-large-files"} <= set(ids)
    (limit,) = re.findall(r"--maxkb=(\d+)", hooks)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # not in an unpacked archive
        sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
        assert {name for name, size in sizes.items() if size > 1024 * int(limit)} == set()
