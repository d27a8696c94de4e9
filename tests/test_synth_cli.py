"""`temposae synth`: training on a world, the scores in its summary, the bench, and mistakes in one line."""

import json
from pathlib import Path

import pytest
import yaml

from .commandline import run

WORLD = {"features": 64, "width": 16, "roots": 4, "depth": 1, "orthogonal_steps": 5, "firing_min": 0.02}
TINY = {
    "stream": {"world": WORLD, "buffer_tokens": 4096},
    "sae": {"d_sae": 32, "k": 4},
    "train": {"tokens": 8192, "batch": 256, "log_every_steps": 8},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def test_a_world_is_trained_on_and_scored(place):
    code, out, err = run("synth", "--config", "tiny.yaml", "--out", "run", "--json", "summary.json")
    assert code == 0, err
    summary = json.loads(Path("summary.json").read_text())
    assert summary == json.loads(Path("run/summary.json").read_text())
    for scores in (summary["recovery"], summary["controls"]["random"]["recovery"]):
        assert 0 < scores["mcc"] < 1
        assert scores["kinds"]["plain"]["features"] > 30
    assert summary["recovery"]["mcc"] > summary["controls"]["random"]["recovery"]["mcc"]
    for word in ("MCC", "random control", "uniqueness", "plain: recovered of"):
        assert word in out
    code, out, err = run("synth", "--resume", "--out", "run", "--json", "again.json")
    assert code == 0, err
    assert json.loads(Path("again.json").read_text())["recovery"] == summary["recovery"]


def test_a_sweep_trains_on_a_world_and_train_takes_a_world(place):
    settings = TINY | {"sweep": {"k": [2, 4]}}
    settings["stream"] = {"world": WORLD | {"positions": 8, "lasting": 0.5}, "buffer_tokens": 4096}
    Path("sweep.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = run("train", "sweep.yaml", "--out", "runs", "--json", "summary.json")
    assert code == 0, err
    dictionaries = json.loads(Path("summary.json").read_text())["dictionaries"]
    assert list(dictionaries) == ["k2", "k4"]
    assert all("lasting" in scores["recovery"]["kinds"] for scores in dictionaries.values())
    assert out.count("Recovery of the world's features") == 2


@pytest.mark.slow
def test_the_bench_writes_rows_and_goes_on_where_it_stopped(place, monkeypatch):
    monkeypatch.setitem(__import__("temposae.bench.synthetic", fromlist=["L0S"]).L0S, "small", (4,))
    kinds = ("--kind", "batchtopk", "--kind", "jumprelu")
    options = ("synth", "bench", "--tokens", "8192", "--library", "temposae", *kinds, "--json", "rows.json")
    code, out, err = run(*options, "--seeds", "1")
    assert code == 0, err
    result = json.loads(Path("rows.json").read_text())
    assert [(row["kind"], row["library"], row["seed"], row["target_l0"]) for row in result["rows"]] == [
        ("batchtopk", "temposae", 0, 4),
        ("jumprelu", "temposae", 0, 4),
    ]
    for row in result["rows"]:
        assert {"l0", "f1", "mcc", "uniqueness", "r2", "dead", "seconds", "stream_share"} < row.keys()
        assert row["random"].keys() == {"f1", "mcc"}
        assert row["mcc"] > row["random"]["mcc"]
    table = [line.replace("|", " ").split() for line in out.splitlines()]
    assert [line[:4] for line in table if "temposae" in line] == [[kind, "4", "temposae", "1"] for kind in kinds[1::2]]
    assert ["matryoshka", "25", "0.8793", "0.7927", "0.9987", "0.7792"] in table
    code, out, err = run(*options, "--seeds", "1")
    assert code == 0, err
    assert "dictionary" not in err
    assert json.loads(Path("rows.json").read_text())["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("synth", "--preset", "large"), ("preset", "large", "small")),
        (("synth", "--k", "600"), ("sae.k: 600", "at most d_sae (512)")),
        (("synth", "--k", "x"), ("--k", "whole number")),
        (("synth", "--config", "missing.yaml"), ("missing.yaml",)),
        (("synth", "--config", "share.yaml"), ("stream.world.lasting: 1.5", "0 to 1")),
        (("synth", "--config", "roots.yaml"), ("stream.world.roots: 2000", "at most features (1024)")),
        (("synth", "--resume"), ("resume", "--out")),
        (("synth", "nothing"), ("nothing", "no such command")),
        (("synth", "bench", "--preset", "large"), ("preset", "large", "small")),
        (("synth", "bench", "--kind", "gated"), ("kind", "gated", "batchtopk")),
        (("synth", "bench", "--library", "sparsify"), ("library", "sparsify", "sae_lens")),
        (("synth", "bench", "--seeds", "0"), ("--seeds", "at least 1")),
        (("synth", "bench", "--json", "other.json"), ("other.json", "results of `temposae synth bench`")),
        (("synth", "bench", "--json", "published.json"), ("published.json", "synthsaebench", "small")),
    ],
)
def test_mistakes_are_refused_in_one_line(place, argv, words):
    Path("share.yaml").write_text(yaml.safe_dump({"stream": {"world": {"positions": 8, "lasting": 1.5}}}))
    Path("roots.yaml").write_text(yaml.safe_dump({"stream": {"world": {"roots": 2000}}}))
    Path("other.json").write_text("{}")
    Path("published.json").write_text(json.dumps({"rows": [], "preset": "synthsaebench"}))
    code, out, err = run(*argv)
    assert code == 2, out
    assert len(err.splitlines()) == 1, err
    assert [word for word in words if word not in err] == [], err
    assert not Path("runs").exists()
