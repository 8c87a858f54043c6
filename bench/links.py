"""A folder of links to import ``fastrope`` from, for sources that are not installed. Imports nothing of ours."""

from __future__ import annotations

from pathlib import Path

BENCH = Path(__file__).resolve().parent
CLONE = BENCH.parent if (BENCH.parent / "fastrope" / "__init__.py").is_file() else None  # None: an installed package
PARTS = ("kernels", "bindings")  # folders of a clone that are subpackages of fastrope


def site(sources: Path, folder: Path) -> Path:
    """``folder``, from which the library of ``sources`` and this benchmark can be imported."""
    package = folder / "fastrope"
    package.mkdir(parents=True)
    for path in (sources / "fastrope").iterdir():
        (package / path.name).symlink_to(path)
    for name in PARTS:
        (package / name).symlink_to(sources / name)
    (package / "bench").symlink_to(BENCH)
    return folder
