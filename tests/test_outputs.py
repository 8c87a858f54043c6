"""Results of commands: what is checked before the work, and that a file is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os

import pytest

pytest.importorskip("PIL")
from PIL import Image

from fastrope import outputs

PICTURE = Image.new("RGB", (4, 4), (200, 30, 30))


# ---- before the work -------------------------------------------------------------------------------------------------


def test_files_that_nobody_named_are_kept(tmp_path):
    """Those of an option may be replaced, those beside them only by force."""
    named, beside = tmp_path / "a.png", tmp_path / "a.json"
    outputs.check_files("--out", [named], [beside])
    named.touch()
    outputs.check_files("--out", [named], [beside])
    beside.touch()
    with pytest.raises(ValueError, match=r"^--out: .*a\.json is there already; --force replaces it"):
        outputs.check_files("--out", [named], [beside])
    outputs.check_files("--out", [named], [beside], force=True)


def test_folders_and_devices_are_no_files(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match=r"^--out: expected a file, received .*, which is something else$"):
            outputs.check_files("--out", [type(tmp_path)(path)])


def test_two_results_need_two_names(tmp_path):
    with pytest.raises(ValueError, match=r"^--out: expected a file of its own for each result, received .* twice$"):
        outputs.check_files("--out", [tmp_path / "a.json"], [tmp_path / "a.json"], force=True)


def test_a_folder_must_take_files(tmp_path, monkeypatch):
    """One that is not there yet will be made, and is not before the work is done."""
    outputs.check_files("--out", [tmp_path / "new" / "newer" / "a.png"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text").touch()
    with pytest.raises(ValueError, match=r"^--out: expected a folder, received .*text, which is none$"):
        outputs.check_files("--out", [tmp_path / "text" / "a.png"])

    def refused(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"^--out: cannot write to .*: Permission denied$"):
        outputs.check_files("--out", [tmp_path / "new" / "a.png"])


def test_a_file_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(ValueError, match=r"^--out: expected a file that may be written, received .*a\.png$"):
        outputs.check_files("--out", [tmp_path / "a.png"])


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300 + ".png", "a\0.png"):
        with pytest.raises(ValueError, match=r"^--out: "):
            outputs.check_files("--out", [tmp_path / name])


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a b.tiff", "bild-\u00e9.bmp"])
def test_formats_that_can_be_written(name, tmp_path):
    outputs.check_format("--out", tmp_path / name)
    assert Image.open(outputs.write_picture(tmp_path / name, PICTURE)).size == (4, 4)


@pytest.mark.parametrize("name", ["a.psd", "a.h5", "a.xbm", "a.fits"])
def test_formats_that_can_only_be_read(name, tmp_path):
    with pytest.raises(ValueError, match=r"^--out: pictures in \w+ can be read but not written; a.png would do$"):
        outputs.check_format("--out", tmp_path / name)


def test_a_picture_is_no_folder(tmp_path):
    for name in ("a.png", "b.PNG"):
        with pytest.raises(ValueError, match=r"^--out: expected a folder, received .*, a picture$"):
            outputs.check_report("--out", tmp_path / name, ["report.md"], force=False)
    outputs.check_report("--out", tmp_path / "run-1.5", ["report.md"], force=False)
    (tmp_path / "report.md").touch()
    with pytest.raises(ValueError, match=r"report\.md is there already"):
        outputs.check_report("--out", tmp_path, ["report.md"], force=False)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = outputs.write_text(tmp_path / "a.txt", "before")

    def full(part):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for error, save in ((OSError, full), (KeyboardInterrupt, lambda part: part.touch() or raising())):
        with pytest.raises(error) as found:
            outputs.write(path, save)
        assert path.read_text() == "before"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
        assert error is not OSError or (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))


def raising():
    raise KeyboardInterrupt


def test_folders_are_made_and_modes_kept(tmp_path):
    path = outputs.write_text(tmp_path / "new" / "newer" / "a.txt", "x")
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    path.chmod(0o604)
    outputs.write_text(path, "y")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("y", 0o604)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "there" / "b.txt")
    outputs.write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "there" / "b.txt").read_text() == "x"


def test_records_take_any_text(tmp_path):
    """A prompt from a terminal with another encoding holds what UTF-8 does not."""
    outputs.write_text(tmp_path / "a.txt", "caf\udce9")
    outputs.write_record(tmp_path / "a.json", {"prompt": "caf\udce9 \u732b"})
    kept = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert kept["prompt"] == "caf\udce9 \u732b"
    assert set(kept) == {"prompt", "torch", "fastrope"}
