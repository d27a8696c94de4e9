"""The command line of a cache: made, trained on, resumed, evaluated; and a mistake is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from temposae.engine.stream.cache import read_manifest

from .commandline import run

TINY = {"stream": {"buffer_tokens": 4096}, "train": {"batch": 256, "log_every_steps": 4}}
FLAGS = ("--tokens", "4096", "--d-sae", "64", "--k", "4")
CACHE = ("--tokens", "12000", "--layer", "0", "--layer", "2", "--shard-mb", "2")
HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "context.yaml").write_text("stream: {context: 48}\n")
    code, out, err = run(
        "cache", folder / "context.yaml", "--out", folder / "cache", *CACHE, "--json", folder / "f.json"
    )
    assert code == 0, err
    assert "tokens" in out
    found = json.loads((folder / "f.json").read_text())
    assert found["hooks"] == HOOKS
    assert 12_000 <= found["tokens"] < 12_000 + 32 * 48
    assert found["shards"] == len(list((folder / "cache").glob("shard_*"))) > 1
    return folder / "cache"


@pytest.fixture
def place(tmp_path, made, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path


def test_train_evaluate_and_resume_from_a_cache(place):
    code, out, err = run("train", "tiny.yaml", "--cache", "cache", "--layer", "2", *FLAGS, "--out", "run")
    assert code == 0, err
    assert f"at {HOOKS[1]} of testbed" in out
    settings = yaml.safe_load((place / "run" / "config.yaml").read_text())["stream"]
    assert (settings["cache"], settings["context"], settings["hook"]) == (str(place / "cache"), 48, HOOKS[1])
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["ce_recovered"] > summary["controls"]["random"]["ce_recovered"]
    assert "cache" in json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])["time"]
    code, _, err = run("train", "--out", "run", "--resume")  # nothing is left to do, and it is measured again
    assert code == 0, err
    code, _, err = run("eval", "core", "--sae", "run", "--json", "core.json")
    assert code == 0, err
    again = json.loads((place / "core.json").read_text())
    assert again["explained_variance"] == pytest.approx(summary["explained_variance"], abs=1e-6)
    assert len(again["per_position"]["position"]) == 48


@pytest.mark.slow
def test_a_sweep_over_the_cached_layers(place):
    (place / "sweep.yaml").write_text(yaml.safe_dump({**TINY, "sweep": {"layer": [0, 2]}}))
    code, _, err = run("train", "sweep.yaml", "--cache", "cache", *FLAGS, "--out", "runs")
    assert code == 0, err
    summary = json.loads((place / "runs" / "summary.json").read_text())["dictionaries"]
    assert {name: one["hook"] for name, one in summary.items()} == dict(zip(("layer0", "layer2"), HOOKS, strict=True))
    assert all(one["explained_variance"] > 0 for one in summary.values())


def test_nothing_is_left_to_resume_and_nothing_changes(place):
    (place / "context.yaml").write_text("stream: {context: 48}\n")
    before = {path.name: path.read_bytes() for path in (place / "cache").iterdir()}
    code, _, err = run("cache", "context.yaml", "--out", "cache", *CACHE, "--resume")
    assert code == 0, err
    assert {path.name: path.read_bytes() for path in (place / "cache").iterdir()} == before


MISTAKES = {
    "out not empty": ("cache --out cache", ("out: cache", "not empty", "--resume")),
    "no out": ("cache --tokens 5", ("--out",)),
    "other settings": ("cache --out cache --resume --tokens 7", ("resume: ", "began with")),
    "dtype": ("cache --out c --dtype int8", ("dtype: int8", "bfloat16 or float32")),
    "tokens": ("cache --out c --tokens 0", ("tokens: 0", "at least 1")),
    "hooks and layers": ("cache --out c --layer 1 --hook blocks.1.hook_resid_post", ("hooks or layers",)),
    "layer": ("cache --out c --layer 9", ("layer: 9", "0 to 3")),
    "cache of a cache": ("cache cached.yaml --out c", ("stream.cache: cache", "give a model, not another cache")),
    "no cache": ("train --cache nowhere --out r", ("cache: nowhere", "cache.json")),
    "layer not cached": ("train --cache cache --layer 1 --out r", ("layer: 1", "cache", *HOOKS)),
    "another model": ("train --cache cache --model smollm2 --out r", ("stream.model: smollm2", "cache", "testbed")),
    "another context": ("train context.yaml --cache cache --out r", ("stream.context: 32", "cache", "48")),
    "layer of a sweep": ("train sweep.yaml --cache cache --out r", ("layer3: ", "cache", *HOOKS)),
}


@pytest.mark.parametrize(("command", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(place, command, words):
    (place / "context.yaml").write_text("stream: {context: 32}\n")
    (place / "sweep.yaml").write_text("sweep: {layer: [0, 3]}\n")
    (place / "cached.yaml").write_text("stream: {cache: cache}\n")
    code, _, err = run(*command.split())
    assert code == 2
    assert [word for word in words if word not in err] == [], err
    if command != "cache --tokens 5":  # typer's own words
        assert len(err.splitlines()) == 1, err
    assert not (place / "r").exists()
    assert not (place / "c" / "cache.json").exists()


def test_a_damaged_shard_stops_training_with_one_line(place):
    for path in (place / "cache").glob("shard_*"):
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    code, _, err = run("train", "tiny.yaml", "--cache", "cache", *FLAGS, "--out", "run")
    assert code == 2
    assert "error: cache: cache/shard_0000" in err.splitlines()[-1]
    assert "is damaged in block" in err.splitlines()[-1]


@pytest.mark.slow
def test_kill_9_and_resume_leaves_the_same_files(tmp_path):
    command = [sys.executable, "-m", "temposae", "cache", "--tokens", "25000", "--shard-mb", "1", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True)
    kills = 0
    while True:
        folder = tmp_path / "killed"
        begun = len(list(folder.glob("shard_*")))
        process = subprocess.Popen([*command, folder, *(["--resume"] if folder.exists() else [])])
        while process.poll() is None and len(list(folder.glob("shard_*"))) < begun + 2:
            time.sleep(0.003)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        read_manifest(folder)
    assert kills >= 2
    expected, found = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "killed"))
    assert found == expected


def test_train_on_activations_of_ones_own(place):
    np.save("mine.npy", np.random.default_rng(0).normal(size=(200, 16, 24)).astype(np.float32))
    code, out, err = run("train", "tiny.yaml", "--activations", "mine.npy", *FLAGS, "--out", "own")
    assert code == 0, err
    assert "CE recovered was not measured: it needs a language model" in out
    assert "random control" in out
    summary = json.loads((place / "own" / "summary.json").read_text())
    assert summary["measured_on"] == "held-out rows"
    assert summary["ce_recovered"] is None
    code, _, err = run("train", "--out", "own", "--resume")
    assert code == 0, err
    again = json.loads((place / "own" / "summary.json").read_text())
    assert again["explained_variance"] == summary["explained_variance"]
    code, _, err = run("eval", "core", "--sae", "own")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "without a model; give --model" in err
    code, _, err = run("eval", "core", "--sae", "own", "--model", "testbed", "--layer", "2")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "sae: d_in = 24 does not fit; blocks.2.hook_resid_post has width 128 in testbed" in err
    code, _, err = run("train", "tiny.yaml", "--activations", "mine.npy", "--model", "testbed", "--out", "other")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "stream.model: testbed is not allowed with activations" in err


def test_a_run_whose_text_is_gone_is_trained_and_measured_later(place):
    text = place / "text.txt"
    text.write_text("\n\n".join("one two three , . the a cat and dog" for _ in range(200)))
    code, _, err = run("cache", "--out", "of-text", "--tokens", "1500", "--data", text)
    assert code == 0, err
    words = text.read_text()
    text.unlink()
    code, _, err = run("train", "tiny.yaml", "--cache", "of-text", *FLAGS, "--out", "run")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(f"error: data: {text} does not exist")
    assert last.endswith("; run is trained, and temposae eval core --sae run evaluates it")
    text.write_text(words)
    code, out, err = run("eval", "core", "--sae", "run")
    assert code == 0, err
    assert "CE recovered" in out
