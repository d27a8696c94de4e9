"""Measuring after training: nothing that goes wrong there loses a run, and what can't be measured is said beforehand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from temposae.cli.output import core_table, runs_table, scores_table
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.storage.files import digest
from temposae.engine.storage.run_folder import report
from temposae.engine.train import train
from temposae.evals import run_evals as evals_run
from temposae.evals import suite
from temposae.evals.run_evals import evaluate, l0_warning
from temposae.evals.run_figures import draw_pareto

from ..commandline import run as command

SAE = SAEConfig(d_in=128, d_sae=32, k=2)
SMALL = ("--d-sae", "32", "--k", "2", "--tokens", "2048")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["the cat sat on the mat and the dog ran off"] * 200))
    return path


def test_an_error_in_measuring_leaves_summary_and_run(tmp_path, text, monkeypatch):
    """Of two dictionaries the first can't be measured, and the second is."""

    def broken(*args, **options):
        if len(calls := broken.__dict__.setdefault("calls", [])) == 0:
            calls.append(1)
            raise RuntimeError("something\nunforeseen")
        return evaluate(*args, **options)

    monkeypatch.setattr(evals_run, "evaluate", broken)
    config = tmp_path / "sweep.yaml"
    config.write_text(f"stream: {{data: {text}}}\nsae: {{d_sae: 32}}\ntrain: {{tokens: 2048}}\nsweep: {{k: [2, 3]}}\n")
    code, out, err = command("train", config, "--eval-rows", "4", "--out", tmp_path / "run")
    assert code == 2
    place = tmp_path / "run" / "k2"
    said = f"{place} is trained, and temposae eval core --sae {place} evaluates it"
    assert f"error: RuntimeError: something unforeseen; {said}\n" in err
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["dictionaries"]
    assert found["k2"]["measured_on"] == "training"
    assert found["k2"]["explained_variance"] is not None
    assert found["k3"]["rows"] == 4
    assert "k3" in out
    assert (tmp_path / "run" / "k3" / "evals" / "core.json").is_file()
    assert command("eval", "core", "--sae", tmp_path / "run" / "k2").code == 0


def test_training_without_evaluation(tmp_path, text):
    code, out, _ = command("train", "--data", text, *SMALL, "--no-eval", "--out", tmp_path / "run")
    assert code == 0
    assert f"temposae eval core --sae {tmp_path / 'run'} evaluates it" in out
    assert not (tmp_path / "run" / "evals").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["measured_on"] == "training"
    assert "after_training: false" in (tmp_path / "run" / "config.yaml").read_text()
    code, _, err = command("eval", "core", "--sae", tmp_path / "run", "--rows", "5")
    assert code == 0
    assert "evaluation: 5 rows x 3 dictionaries, CE on 5 of them, about " in err
    assert json.loads((tmp_path / "run" / "evals" / "core.json").read_text())["rows"] == 5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_named_on_reading(stream_of, tmp_path, value):
    train(stream_of(), SAE, TrainConfig(tokens=512, batch=256), out=tmp_path / "run")
    found = checkpoint.find(tmp_path / "run")
    path = found.folder / "random.safetensors"
    weights = load_file(path)
    weights["W_enc"][0, 3] = value
    save_file(weights, path)
    manifest = json.loads((found.folder / "checkpoint.json").read_text())
    del manifest["sha256"]
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    (found.folder / "checkpoint.json").write_text(json.dumps(manifest))
    again = checkpoint.find(tmp_path / "run")
    again.dictionary("sae")
    with pytest.raises(UserError, match=r"random\.safetensors is damaged; 1 of 4,096 numbers of W_enc are NaN or inf"):
        again.dictionary("random")


def test_what_cannot_be_measured_is_said_before_anything_is_collected(stream_of, tmp_path, text, monkeypatch, capsys):
    stream = stream_of(data=str(text))
    train(stream, SAE, TrainConfig(tokens=512, batch=256), out=tmp_path / "run")
    read = []
    real = type(stream).read
    monkeypatch.setattr(
        type(stream), "read", lambda self, rows: read.append(capsys.readouterr().err) or real(self, rows)
    )
    with pytest.raises(UserError, match="^unlearning: .* --file forget_questions=PATH --file retain_questions=PATH"):
        evaluate(checkpoint.find(tmp_path / "run"), stream, None, ["unlearning"])
    assert read == []
    names = ["core", "sparse_probing", "ground_truth", "scr"]
    found = evaluate(checkpoint.find(tmp_path / "run"), stream, None, names, rows=4)
    said = read[0]
    assert "sparse_probing: " in said
    assert "--set FILE?text=COLUMN&label=COLUMN" in said
    assert all(f"will not be measured: {name}: " in said for name in names[1:])
    assert [name for name, result in found.items() if "skipped" in result] == names[1:]


def test_files_that_are_not_there_are_named_before(stream_of, tmp_path):
    stream = stream_of()
    for name, sets, files in (
        ("sparse_probing", ["gone.csv?text=a&label=b"], {}),
        ("positions", [], {"blimp": ["gone.jsonl"]}),
        ("unlearning", [], {"forget_text": ["gone.txt"]}),
    ):
        assert "" in suite.missing_inputs(name, stream, SAE, sets, files), name
    lacking = [name for name in suite.EVALS if suite.missing_inputs(name, stream, SAE, [], {})]
    assert lacking == ["sae_probes"]  # it reads English


def scores(**changes) -> dict:
    common = {"explained_variance": 0.5, "ce_recovered": 0.6, "ce_recovered_over_mean": 0.7, "l0": 2.0}
    return {**common, "dead_fraction": 0.1, "hook": "h", "activation": "topk", "d_sae": 32, **changes}


def test_a_missing_score_leaves_the_others_beside_it(tmp_path, capsys):
    missing = scores(ce_recovered=None, controls={"random": scores(ce_recovered=0.25), "mean": scores()})
    core_table(missing | {"no_random_control": "train.control: false"}, "title")
    out = capsys.readouterr().out
    assert "0.2500" in out
    assert "or zero ablation does not raise the loss" in out
    assert "no random control (train.control: false)" in out
    several = {"a": scores(explained_variance=None, l0=None, controls={"random": scores()}), "b": scores(controls={})}
    runs_table({"dictionaries": several, "model": "m"})
    assert "random EV" in capsys.readouterr().out
    draw_pareto(tmp_path, several)
    result = {
        "top_1": None, "top_2": 0.75, "controls": {"random": {"top_1": 0.625, "top_2": 0.5}}, "llm": {"top_1": 0.875}
    }  # fmt: skip
    scores_table(result, "probing")
    out = capsys.readouterr().out
    assert all(number in out for number in ("0.7500", "0.6250", "0.5000", "0.8750", "LLM"))
    assert "- no value for dictionary: top 1" in out
    assert "- no value for LLM: top 2" in out


@pytest.mark.parametrize(("l0", "warns"), [(32.0, False), (33.5, False), (30.5, False), (35.0, True), (12.0, True)])
def test_an_l0_that_is_not_training_s_is_told(tmp_path, l0, warns):
    for step, trained in ((1, 500.0), (2, 32.0), (3, 64.0)):
        line = {"step": step, "tokens": 8 * step, "loss": 1.0, "fvu": 0.5, "dead_fraction": 0.0}
        report(tmp_path, line | {"l0": trained})
    warning = l0_warning(tmp_path, 2, l0)
    assert (warning is not None) == warns
    if warning is not None:
        assert warning.startswith(f"L0 is {l0:.1f} on held-out text and was 32.0 at the end of training (")
    assert l0_warning(tmp_path / "nowhere", 2, l0) is None


def test_a_wrong_threshold_is_told_in_results_report_and_table(stream_of, tmp_path, capsys):
    sae = SAEConfig(d_in=128, d_sae=64, k=4, activation="batchtopk")
    train(stream_of(), sae, TrainConfig(tokens=2048, batch=256), out=tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics[-1]["l0"] = 1.0
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    result = evaluate(checkpoint.find(tmp_path / "run"), stream_of(), tmp_path / "run", rows=8)["core"]
    (warning,) = result["warnings"]
    assert "and was 1.0 at the end of training" in warning
    assert warning.split(" (")[0] in (tmp_path / "run" / "report.md").read_text()
    core_table(result, "title")
    assert f"warning: {warning}" in capsys.readouterr().out
