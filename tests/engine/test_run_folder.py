"""A run folder: what is in it means the same from anywhere, and a change behind a run's back is named."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.storage.files import check_writable, contents, remove_folder, write_json
from temposae.engine.storage.run_folder import CONFIG, difference, read_settings
from temposae.engine.stream import ActivationStream
from temposae.engine.train import train

SAE = SAEConfig(d_in=128, d_sae=32, k=4)
SETTINGS = TrainConfig(tokens=1024, batch=256, checkpoint_every_steps=1, control=False)


@pytest.fixture
def run(testbed, tmp_path, monkeypatch, texts) -> Path:
    """A run whose text was named by a relative path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    stream = ActivationStream(StreamConfig(data="text.txt", buffer_tokens=2048), model=testbed)
    train(stream, SAE, SETTINGS, out=tmp_path / "run")
    return tmp_path / "run"


def test_paths_are_absolute_in_config_and_checkpoint(run, tmp_path, monkeypatch, testbed):
    text = str(tmp_path / "text.txt")
    assert yaml.safe_load((run / CONFIG).read_text())["stream"]["data"] == text
    found = checkpoint.find(run)
    assert found.run is not None
    assert (found.run.stream.data, found.run.stream.model) == (text, "testbed")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = read_settings(run)
    assert isinstance(settings, RunConfig)
    train(ActivationStream(settings.stream, model=testbed), SAE, SETTINGS, out=run, resume=True)


def test_a_folder_with_the_name_of_a_built_in_model_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "testbed").mkdir()
    settings = RunConfig(sae=SAE)
    assert (
        difference({"": settings}, {"": settings.model_copy(update={"stream": StreamConfig(model="testbed")})}) is None
    )


def test_a_changed_digit_is_not_resumed_with(run, testbed):
    stream = ActivationStream(StreamConfig(data="text.txt", buffer_tokens=2048), model=testbed)
    whole = (run / CONFIG).read_text()
    (run / CONFIG).write_text(whole.replace("beta1: 0.9", "beta1: 0.8"))
    with pytest.raises(UserError, match=r"resume: .*config.yaml has changed since it was written"):
        train(stream, SAE, SETTINGS, out=run, resume=True)
    unsealed = whole.split("\n", 1)[1].replace("beta1: 0.9", "beta1: 0.8")
    (run / CONFIG).write_text(unsealed)  # by hand, with settings to match
    changed = SETTINGS.model_copy(update={"beta1": 0.8})
    with pytest.raises(UserError, match=r"resume: train.beta1 is 0.8 in .*config.yaml, and 0.9 in .*checkpoint.json"):
        train(stream, SAE, changed, out=run, resume=True)


def test_a_checkpoint_that_was_half_removed_is_no_hindrance(run, testbed, monkeypatch):
    """As a kill leaves it that comes while an old checkpoint is removed: with some of its files, or under another name."""
    steps = checkpoint.all_in(run)
    real = shutil.rmtree

    def killed(path, *rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(steps[-1])
    monkeypatch.setattr(shutil, "rmtree", real)
    assert checkpoint.all_in(run) == steps[:-1]
    (run / "checkpoints" / "step_00000001").mkdir()
    (run / "checkpoints" / "step_00000001" / "sae.safetensors").touch()  # by an earlier version
    stream = ActivationStream(StreamConfig(data="text.txt", buffer_tokens=2048), model=testbed)
    train(stream, SAE, SETTINGS, out=run, resume=True)
    assert sorted((run / "checkpoints").iterdir()) == steps == checkpoint.all_in(run)


@pytest.mark.parametrize("names", [{"../../sae": {}}, {"/abs": {}}, {"": {}}, {"a/b": {}}])
def test_names_in_a_manifest_stay_within_its_folder(run, names):
    path = checkpoint.find(run).folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for change in ({"dictionaries": names}, {"files": {f"{name}.safetensors": {} for name in names}}):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=r"checkpoint.json is damaged: '.*' is not a valid file name"):
            checkpoint.find(run)


def test_a_pipe_is_written_to_and_a_file_of_another_kind_is_kept(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    check_writable(tmp_path / "pipe")  # which waits for nobody
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join()
    assert json.loads(got[0]) == {"a": 1}
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"json: .*notes.txt exists and is a file of another kind"):
        check_writable(tmp_path / "notes.txt")
    for text in ("", '{"old": 1}', "[1]"):
        (tmp_path / "old.json").write_text(text)
        check_writable(tmp_path / "old.json")
        assert (tmp_path / "old.json").read_text() == text
    (tmp_path / "dangling").symlink_to(tmp_path / "new.json")
    check_writable(tmp_path / "dangling")
    write_json(tmp_path / "dangling", {})
    assert (tmp_path / "dangling").is_symlink()
    assert [path.name for path in contents(tmp_path)] == ["dangling", "new.json", "notes.txt", "old.json", "pipe"]
    check_writable(Path(os.devnull))
    with pytest.raises(UserError, match="json: .* can't be written"):
        check_writable(tmp_path)
