"""A folder has one writer at a time: the second is refused in a line, and a dead one's lock is taken over."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from temposae.engine.errors import UserError
from temposae.engine.storage.files import LOCK
from temposae.engine.storage.lock import owned
from temposae.engine.storage.run_folder import check_free

from ..commandline import run

PROCESSES = multiprocessing.get_context("spawn")


def hold(folder: Path, ready) -> None:
    with owned(folder):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """Another process that owns tmp_path / run."""
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_second_is_refused_by_name_of_the_first(tmp_path, other):
    says = f"out: {tmp_path / 'run'} is in use by process {other.pid} on {socket.gethostname()}; wait until that ends"
    with pytest.raises(UserError, match=says), owned(tmp_path / "run"):
        raise AssertionError
    for argv in (
        ("train", "--tokens", 1000, "--out"),
        ("train", "--resume", "--out"),
        ("cache", "--tokens", 1000, "--out"),
        ("campaign", "--quick", "--out"),
        ("campaign", "--quick", "--resume", "--out"),
    ):
        if "--resume" in argv:
            (tmp_path / "run" / ("config.yaml" if argv[0] == "train" else "campaign.yaml")).write_text(
                "sae: {d_in: 128, d_sae: 64}" if argv[0] == "train" else "runs: [A2]"
            )
        code, out, err = run(*argv, tmp_path / "run")
        assert (code, out) == (2, "")
        assert says in err


def test_what_a_killed_owner_left_is_taken_over(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    left = json.loads((tmp_path / "run" / LOCK).read_text())
    assert left == {"host": socket.gethostname(), "pid": other.pid}
    check_free(tmp_path / "run")  # it counts as empty
    with owned(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_another_hosts_lock_is_left_to_the_user(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    says = r"in use by process 7 on elsewhere; if that no longer runs, remove .*\.lock"
    with pytest.raises(UserError, match=says), owned(tmp_path):
        raise AssertionError
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00\x01"])
def test_a_damaged_lock_of_nobody_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with owned(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_owns_a_folder_may_ask_again_and_an_empty_one_goes(tmp_path):
    with owned(tmp_path / "a" / "run"), owned(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / LOCK).exists()
    assert not (tmp_path / "a").exists()
    with owned(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: .*file is not a folder; give a new folder"), owned(tmp_path / "file"):
        raise AssertionError
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"out: {place} can't be written"), owned(place):
            raise AssertionError


def test_a_link_in_place_of_a_lock_leads_nowhere(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"out: .*run can't be written"), owned(tmp_path / "run"):
        raise AssertionError
    assert (tmp_path / "victim").read_text() == "mine"
