"""A run, a cache and a feature store that version 0.1.0 wrote (commit f0e3547) are read, and the run goes on as it did."""

import json
import shutil
from pathlib import Path

import pytest
import temposae as ts
from temposae.engine.config import StreamConfig
from temposae.engine.storage.run_folder import read_metrics, read_settings
from temposae.engine.stream import ActivationStream
from temposae.evals import features

from .commandline import run

DATA = Path(__file__).parent / "data" / "first_version"


def test_a_stopped_run_goes_on_to_the_same_figures(tmp_path):
    """Its learning rate, which config.yaml leaves to the default, is the default of that version."""
    shutil.copytree(DATA / "run", tmp_path / "run")
    result = run("train", "--out", tmp_path / "run", "--resume")
    assert result.code == 0, result.err
    found = read_metrics(tmp_path / "run")
    expected = [json.loads(line) for line in (DATA / "metrics_of_the_whole_run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(10, 90, 10))
    for one, other in zip(found, expected, strict=True):
        assert one["lr"] == other["lr"]
        for key in ("loss", "fvu", "l0"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)
            assert one["random"][key] == pytest.approx(other["random"][key], rel=1e-3)


def test_its_dictionary_loads():
    assert ts.load(DATA / "run").cfg.d_sae == 48
    settings = read_settings(DATA / "run")
    assert settings.train.lr == pytest.approx(2e-4 * (2**14 / 48) ** 0.5)
    assert settings.stream.text_field is None


def test_a_cache_is_read():
    stream = ActivationStream(StreamConfig(cache=str(DATA / "cache"), buffer_tokens=64), tokens=200, batch=20)
    batch = stream.next(20)
    assert batch.x.shape == (20, 128)
    assert int(batch.pos.max()) < 32


def test_a_store_is_read():
    found = features.read(DATA / "store")
    assert features.info(DATA / "store")["tokens"] == len(set(zip(found["row"], found["position"], strict=True)))
    assert len(found["value"]) == pytest.approx(4 * features.info(DATA / "store")["tokens"], rel=0.1)
    assert (features.read(DATA / "store", latent=7)["latent"] == 7).all()
