"""Files are written whole or not at all, and those who may read other new files may read them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from temposae import SAEConfig, SparseAutoencoder, save
from temposae.engine import interchange
from temposae.engine.storage.files import UNFINISHED, whole_file, write_json, write_text


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_every_file_has_the_mode_of_a_new_one(umask, tmp_path):
    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=20, activation="jumprelu", k=3))
    save(sae, tmp_path / "own")
    for library in ("saelens", "dictionary_learning", "gemma-scope"):
        interchange.write(sae, tmp_path / library, library)
    write_json(tmp_path / "a.json", {})
    with whole_file(tmp_path / "private") as fresh:
        fresh.unlink()
        os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o600))  # as tempfile makes them
    assert modes(tmp_path) == {0o666 & ~umask}


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path):
    write_text(tmp_path / "a", "before")

    def half() -> None:
        with whole_file(tmp_path / "a") as fresh:
            fresh.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_what_a_kill_left_is_no_hindrance(tmp_path):
    (tmp_path / f"{UNFINISHED}a").write_text("half of something longer than what comes")
    write_text(tmp_path / "a", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "after"


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"
    write_json(Path(os.devnull), {})
    assert Path(os.devnull).is_char_device()


def test_a_full_disk_is_named_with_the_file_and_nothing_stays(tmp_path):
    def full() -> None:
        with whole_file(tmp_path / "report.md") as fresh:
            fresh.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        full()
    assert error.value.filename == str(tmp_path / "report.md")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_one_file_and_neither_loses_its_own(tmp_path):
    """What another process writes at the time is left alone; what a dead one left goes."""
    living, dead = (tmp_path / f"{UNFINISHED}a-{process}" for process in (os.getppid(), 2**22 + 1))
    for path in (living, dead):
        path.write_text("half")
    write_text(tmp_path / "a", "after")
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / "a"])


@pytest.mark.parametrize("to", ["pipe", "file"])
def test_what_stands_for_an_open_file_is_written_to(tmp_path, to):
    """Printed before it, written, printed behind it: in that order, also where standard output is a file."""
    code = (
        "from pathlib import Path; from temposae.engine.storage.files import check_writable, write_json; print('before'); "
        "out = Path('/dev/stdout'); check_writable(out); write_json(out, [1]); print('behind')"
    )
    if to == "pipe":
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    else:
        with (tmp_path / "log").open("w") as log:
            subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
        said = (tmp_path / "log").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert said.split() == ["before", "[", "1", "]", "behind"]


def test_nothing_else_renames_or_makes_temporary_files():
    """One way to write a file whole: that of `engine.files`."""
    root = Path(__file__).resolve().parents[2]
    sources = [
        path for part in ("engine", "evals", "reporting", "campaign", "cli") for path in (root / part).rglob("*.py")
    ]
    guilty = [
        str(path.relative_to(root))
        for path in sources
        if path.name != "files.py"
        and any(call in path.read_text() for call in ("os.replace(", "os.rename(", "fresh.replace(", "fresh.rename("))
    ]
    assert guilty == []
