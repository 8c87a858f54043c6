"""``fastrope comfyui``: put the node pack into a ComfyUI, or into a zip."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = "fastrope"  # within custom_nodes
OWN = re.compile(r'^name = "fastrope"$', re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; prints what it wrote."""
    parser = argparse.ArgumentParser(prog="fastrope comfyui", description="The node pack for ComfyUI.")
    actions = parser.add_subparsers(dest="action", required=True)
    install = actions.add_parser("install", help="put the nodes into a ComfyUI")
    install.add_argument("path", type=Path, help="the folder of ComfyUI, or its custom_nodes")
    install.add_argument(
        "--copy", action="store_true", help="copy the folder; by default it is linked where that works"
    )
    pack = actions.add_parser("zip", help="pack the nodes, to unpack in custom_nodes or hand to the registry")
    pack.add_argument("file", type=Path, nargs="?", default=Path("fastrope-comfyui.zip"), help="what to write")
    arguments = parser.parse_args(argv)
    if arguments.action == "install":
        place, how = install_into(arguments.path, arguments.copy)
        print(
            f"{how} {place}\nRestart ComfyUI; the nodes are under FastRoPE, example workflows under Browse Templates."
        )
    else:
        count = write_zip(arguments.file)
        print(f"{arguments.file}: {count} files")
    return 0


def source() -> Path:
    """The folder of the pack, within the package."""
    from fastrope.bindings import comfyui

    return Path(next(iter(comfyui.__path__))) / "pack"


def install_into(path: Path, copy: bool = False) -> tuple[Path, str]:
    """Link the pack into ``custom_nodes``, or copy it.

    Args:
        path: the folder of ComfyUI, or its ``custom_nodes``.
        copy: never link.

    Returns:
        Where it lies now, and ``"linked"`` or ``"copied"``.

    Raises:
        ValueError: no ComfyUI, or something of another's in the pack's place.
    """
    nodes = path if path.name == "custom_nodes" else path / "custom_nodes"
    if not nodes.is_dir():
        raise ValueError(f"path: expected the folder of ComfyUI, with custom_nodes in it, received {path}")
    place = nodes / FOLDER
    _make_way(place)
    if not copy:
        try:
            place.symlink_to(source(), target_is_directory=True)
        except OSError:  # Windows without the right to link, file systems that have no links
            copy = True
    if copy:
        shutil.copytree(source(), place, ignore=shutil.ignore_patterns("__pycache__"))
    return place, "copied" if copy else "linked"


def write_zip(file: Path) -> int:
    """Write the pack, under its folder's name; the same bytes every time. Returns the number of files."""
    folder = source()
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo("/".join((FOLDER, *path.relative_to(folder).parts)), (2020, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return len(files)


def _make_way(place: Path) -> None:
    """Remove an earlier pack.

    Raises:
        ValueError: what is there is not ours.
    """
    if place.is_symlink():
        if not _is_ours(place) and place.exists():
            raise ValueError(f"{place}: expected nothing or an earlier pack, received a link to {os.readlink(place)}")
        place.unlink()
    elif place.exists():
        if not _is_ours(place):
            raise ValueError(
                f"{place}: expected nothing or an earlier pack, received files of another's; move them first"
            )
        shutil.rmtree(place)


def _is_ours(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and bool(OWN.search(project.read_text(encoding="utf-8", errors="replace")))
