#!/usr/bin/env python3
"""Set up this clone and run it. Needs nothing but Python 3.10 - 3.14.

    python3 dev.py demo [arguments of "fastrope demo"]
    python3 dev.py test [arguments of pytest]
    python3 dev.py docs [folder for the API reference, site by default]

The first call makes a virtual environment in .venv and installs torch, the package (editable) and what the command
needs; later calls reuse it until pyproject.toml or this file changes. Delete .venv to start afresh.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "fastrope.json"
PYTHONS = ((3, 10), (3, 14))  # those that have a build of the torch below
TORCH = "2.13.0"
EXTRAS = {"demo": {"demo"}, "docs": {"docs"}, "test": {"demo", "docs", "test"}}  # what each of pyproject.toml brings
# What pdoc documents, in order: packages with all they hold, and ("!") patterns of what not. These are the public
# names, the methods and the bindings; how the core does its work is for readers of the sources.
DOCUMENTED = [
    "fastrope", r"!fastrope\.", "fastrope.methods", "fastrope.bindings.diffusers", r"!fastrope\.bindings\.diffusers\.",
    "fastrope.bindings.llamagen", r"!fastrope\.bindings\.llamagen\.", "fastrope.bindings.transformers",
]  # fmt: skip
PDOC = ["--docformat", "google", "--no-show-source"]
STRICT = [f"-Werror::UserWarning:pdoc.{module}" for module in ("extract", "doc", "doc_types", "docstrings")]
MAX_WORKERS = 8  # each test worker imports torch: about 1 GB


class Failure(Exception):
    """Something the user can read and act on."""


def main(argv):
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        found = ".".join(map(str, sys.version_info[:3]))
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        raise Failure(f"Python: expected {first} to {last}, received {found}. Try: python3.11 dev.py {' '.join(argv)}")
    if not argv or argv[0] not in EXTRAS:
        print(__doc__.strip())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    command, *rest = argv
    set_up(command)
    if command == "demo":
        return run(BIN / "fastrope", "demo", *rest)
    if command == "docs":
        return build_docs(Path(*rest) if rest else ROOT / "site")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cpus, MAX_WORKERS) if cpus > 1 else 0
    # The pytest script and not "python -m pytest", which would put the folder "kernels" on sys.path.
    # Workers take tests of each other when theirs are done, so that none is left alone with what takes minutes.
    return run(BIN / "pytest", "-n", workers, "--dist", "worksteal", *rest)  # a later -n or --dist wins


def build_docs(folder):
    """The API reference, from docstrings, from another folder: Python would take the clone's own for the package."""
    return run(BIN / "python", *STRICT, "-m", "pdoc", *PDOC, "-o", folder.resolve(), *DOCUMENTED, cwd=VENV)


def set_up(extra):
    """Bring .venv up to date for ``extra``, doing nothing if it is."""
    gpu = has_nvidia_gpu()
    want = {
        "python": sys.version.split()[0],
        "files": hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()).hexdigest(),
        "gpu": gpu,
    }
    have = read_stamp()
    extras = set(have.pop("extras", ()))
    current = venv_python() == want["python"]
    if current and have == want and extra in extras:
        return
    if not current:
        make_venv()
        extras = set()
    STAMP.unlink(missing_ok=True)  # an interrupted installation must not look finished
    install_torch(gpu)
    wanted = "test" if "test" in extras | {extra} else ",".join(sorted(extras | {extra}))
    say(f"installing fastrope[{wanted}] (editable)")
    check("installing fastrope", *PIP, "--editable", f".[{wanted}]")
    brought = set().union(*(EXTRAS[name] for name in wanted.split(",")))
    STAMP.write_text(json.dumps({**want, "extras": sorted(brought)}))
    say("ready")


def make_venv():
    say(f"making a virtual environment in {VENV.name} with Python {sys.version.split()[0]}")
    try:
        check("making the virtual environment", sys.executable, "-m", "venv", "--clear", VENV)
    except Failure as failure:
        raise Failure(f"{failure}. On Debian and Ubuntu the module is a package of its own: python3-venv") from None


def install_torch(gpu):
    """torch comes first, so that its build is chosen here and not by whoever depends on it."""
    if not gpu and sys.platform == "linux":
        say(f"no NVIDIA GPU found: looking for a CPU build of torch {TORCH}")
        found = subprocess.run([*PIP, f"torch=={TORCH}+cpu"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if found.returncode == 0:
            return
        if "No matching distribution" not in found.stderr:
            print(found.stderr, file=sys.stderr)
        say(
            "pip knows no CPU build, so the general one it is. It may bring several GB of CUDA packages that this "
            "machine cannot use; to avoid them, stop here and point pip at torch's CPU wheels (extra-index-url or "
            "find-links in its configuration)"
        )
    else:
        say(f"installing torch {TORCH}")
    check("installing torch", *PIP, f"torch=={TORCH}")


def has_nvidia_gpu():
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def read_stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def venv_python():
    """Version of the environment's Python; None where there is no working one."""
    try:
        found = subprocess.run([BIN / "python", "-V"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return None
    return found.stdout.split()[-1] if found.returncode == 0 else None


PIP = [str(BIN / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]


def check(what, *command):
    code = run(*command)
    if code:
        raise Failure(f"{what} failed with exit code {code} (see above)")


def run(*command, cwd=ROOT):
    return subprocess.run([str(part) for part in command], cwd=cwd).returncode


def say(message):
    print(f"[dev] {message}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as failure:
        sys.exit(f"[dev] error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
