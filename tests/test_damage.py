"""One bit flipped, or the end cut off, anywhere in what we keep: it is named, with the file, or changes nothing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from temposae import ActivationStream, SAEConfig, StreamConfig, TrainConfig
from temposae.campaign.config import CampaignConfig
from temposae.campaign.results import FORMAT, RESULTS, read_results
from temposae.campaign.run_campaign import SETTINGS, read_config
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import CONFIG, HELD_OUT, METRICS, begin, read_metrics, read_settings
from temposae.engine.storage.sealed import write_json
from temposae.engine.stream.cache import CacheSource
from temposae.engine.stream.cache_writer import write_cache
from temposae.engine.train import train
from temposae.evals import features, result_files

PLACES = 50  # of each file


def damage(whole: bytes, seed: int) -> list[bytes]:
    """The bytes of a file with one bit flipped, or cut short, `PLACES` times."""
    draw = random.Random(seed)
    found = []
    for nth in range(PLACES):
        at = draw.randrange(len(whole))
        if nth % 5 == 4:
            found.append(whole[:at])
        else:
            found.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def check(path: Path, read: Callable[[], Any]) -> int:
    """How often damage to `path` was named by `read`, which else gives what it gives of the whole file."""
    whole, expected = path.read_bytes(), read()
    said: list[str] = []
    for damaged in damage(whole, seed=len(whole)):
        path.write_bytes(damaged)
        try:
            assert same(read(), expected)
        except UserError as error:
            said.append(str(error))
    path.write_bytes(whole)
    assert all(path.name in one and "\n" not in one for one in said)
    return len(said)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, testbed) -> Path:
    """A run, a cache, a feature store and a campaign's two files."""
    folder = tmp_path_factory.mktemp("kept")
    config = StreamConfig(buffer_tokens=2048, rows_per_forward=8)
    settings = TrainConfig(tokens=1024, batch=256, log_every_steps=1, held_out_rows=4)
    train(ActivationStream(config, model=testbed), SAEConfig(d_in=128, d_sae=64, k=4), settings, out=folder / "run")
    result_files.write(folder / "run", "core", {"explained_variance": 0.5, "of": {"version": 7}, "controls": {}})
    write_cache(folder / "cache", config, 2000, shard_mb=0.3, model=testbed)
    found = checkpoint.find(folder / "run")
    stream = ActivationStream(config.model_copy(update={"repeat": False}), model=testbed)
    features.encode(found, stream, folder / "store", tokens=300)
    begin(folder / "campaign", CampaignConfig(runs=("A2",), stream={"context": 64}), SETTINGS)
    results = {"format": FORMAT, "runs": {"A2": {"scores": {}}}, "baselines": {}, "seeds": 1}
    write_json(folder / "campaign" / RESULTS, results)
    return folder


def test_every_file_of_a_checkpoint(kept):
    def read() -> Any:
        found = checkpoint.find(kept / "run")
        weights = {name: found.dictionary(name).state_dict() for name in found.dictionaries}
        others = {name: found.tensors(name) for name in ("state", "stream")}
        return found.manifest, found.run, found.where, found.tokens, weights, others

    folder = checkpoint.find(kept / "run").folder
    files = sorted(path for path in folder.iterdir())
    assert len(files) == 5
    for path in files:
        assert check(path, read) >= PLACES - 5  # a few bits of a checksum's name change nothing


def test_a_runs_settings_and_results(kept):
    assert check(kept / "run" / CONFIG, lambda: read_settings(kept / "run")) >= PLACES - 10
    assert check(kept / "run" / "evals" / "core.json", lambda: result_files.read(kept / "run", "core")) >= PLACES - 10


@pytest.mark.parametrize("name", [METRICS, HELD_OUT])
def test_a_line_of_a_log_that_cannot_be_read_is_named_and_left_out(kept, capsys, name):
    """Digits aside: logs have no checksum."""
    path = kept / "run" / name
    whole, expected = path.read_bytes(), read_metrics(kept / "run", name=name)
    named = 0
    for damaged in damage(whole, seed=1):
        path.write_bytes(damaged)
        found = read_metrics(kept / "run", name=name)
        said = capsys.readouterr().err
        if len(found) < len(expected) and len(damaged) == len(whole):
            lines = {
                number for number, line in enumerate(damaged.split(b"\n"), 1) if line != whole.split(b"\n")[number - 1]
            }
            assert f"{path}: line {min(lines)} is damaged and skipped" in said
            named += 1
        assert len(found) >= len(expected) - 2 or len(damaged) < len(whole)  # two, where a line's end was hit
        assert all(isinstance(line["step"], int) and isinstance(line["fvu"], float) for line in found)
    path.write_bytes(whole)
    assert named > 5


def test_every_file_of_a_cache(kept):
    def read() -> Any:
        source, found = CacheSource(kept / "cache", repeat=False), []
        while (batch := source.next()) is not None:
            found.append(batch.tensors())
        return found

    for path in sorted((kept / "cache").iterdir()):
        assert check(path, read) >= PLACES - 5


def test_every_file_of_a_feature_store(kept):
    store = kept / "store"
    about = features.info(store)
    for path in [store / "store.json", *(store / part for part in about["parts"])]:
        assert check(path, lambda: features.read(store)) >= PLACES - 5


def test_a_campaigns_files(kept):
    folder = kept / "campaign"
    assert check(folder / SETTINGS, lambda: read_config(folder)) >= PLACES - 10
    assert check(folder / RESULTS, lambda: read_results(folder)) >= PLACES - 10
