"""The command line. A mistake gets one line that names the field and what is allowed, and harms nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import temposae
import torch
import yaml

from .commandline import Result, run

TINY = {"stream": {"context": 32, "buffer_tokens": 4096}, "train": {"batch": 256, "log_every_steps": 4}}
TINY_FLAGS = ("--tokens", "4096", "--d-sae", "64", "--k", "4")
SCORES = ("explained_variance", "ce_recovered", "l0", "dead_fraction")
LAYERS, WIDTH, LONGEST = 4, 128, 128  # of the testbed's model
needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody may write")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(place: Path, argv: tuple[str | Path, ...], words: tuple[str, ...]) -> None:
    """`temposae ARGV` fails with one line that holds every one of `words`, and leaves all files below `place` alone."""
    before = files(place)
    code, out, err = run(*argv)
    assert code != 0, out
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert files(place) == before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: files with something wrong about them, and a config for a tiny run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("the boats near the harbor are old .")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 64)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x81" * 64)
    (tmp_path / "no_text.jsonl").write_text('{"text": "the boats ."}\n{"body": "the wolf ."}\n')
    (tmp_path / "number.jsonl").write_text('{"text": "the boats ."}\n{"text": 7}\n')
    (tmp_path / "not_json.jsonl").write_text("the boats near the harbor\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    return tmp_path


# --- mistakes in options of train

OPTIONS = {
    "unknown model": ("--model testbet", ("model", "'testbet'", "did you mean testbed")),
    "model folder without config": ("--model ./folder", ("model", "./folder", "config.json")),
    "model name with odd characters": ("--model a:b", ("model", "'a:b'", "testbed")),
    "unknown hook": ("--hook blocks.1.hook_resid_pots", ("hook", "'blocks.1.hook_resid_pots'", "blocks.1.hook_resid_post")),
    "negative layer": ("--layer -1", ("layer", "-1", f"0 to {LAYERS - 1}")),
    "layer too high": ("--layer 99", ("layer", "99", f"0 to {LAYERS - 1}")),
    "layer and hook": ("--layer 1 --hook blocks.1.hook_resid_post", ("hook", "layer", "not both")),
    "misspelt activation": ("--activation topkk", ("sae.activation: 'topkk'", "must be topk", "relu")),
    "k above d_sae": ("--k 65 --d-sae 64", ("sae.k: 65", "at most", "d_sae (64)")),
    "k above the default d_sae": ("--k 2000", ("sae.k: 2000", "at most", f"d_sae ({8 * WIDTH})")),
    "k zero": ("--k 0", ("sae.k: 0", "an integer from 1")),
    "d_sae zero": ("--d-sae 0", ("sae.d_sae: 0", "an integer at least 1")),
    "lr nan": ("--lr nan", ("train.lr: nan", "finite")),
    "lr inf": ("--lr inf", ("--lr: 'inf'", "finite")),
    "lr zero": ("--lr 0", ("train.lr: 0", "a number above 0")),
    "negative tokens": ("--tokens -5", ("train.tokens: -5", "an integer from 1")),
    "tokens beyond count": (f"--tokens {10**400}", ("--tokens: '1000", "finite")),
    "seed beyond count": (f"--seed {10**30}", ("train.seed: 1000", "below 2^63")),
    "d_sae beyond memory": (f"--d-sae {10**13}", ("d_sae",)),
    "negative seed": ("--seed -1", ("train.seed: -1", "an integer at least 0")),
    "batch above half the buffer": ("batch.yaml", ("train.batch: 4096", "at most half", "buffer_tokens (4096)")),
    "config missing": ("nowhere.yaml", ("config", "nowhere.yaml", "No such file")),
    "config is a folder": ("folder", ("config", "folder", "directory")),
    "config is binary": ("binary.txt", ("config", "binary.txt", "not YAML")),
    "data empty": ("--data empty.txt", ("data", "empty.txt", "must hold text")),
    "data missing": ("--data shirt.txt", ("data", "shirt.txt", "does not exist", "did you mean short.txt")),
    "data missing, by its path": ("--data ./shirt.txt", ("data", "./shirt.txt", "does not exist", "short.txt")),
    "data folder without a dataset": ("--data folder", ("data", "folder")),
    "data without text field": ("--data no_text.jsonl", ("data", "no_text.jsonl line 2", '"text" field')),
    "data with a number for text": ("--data number.jsonl", ("data", "number.jsonl line 2", "field text", "token ids")),
    "data not json": ("--data not_json.jsonl", ("data", "not_json.jsonl line 1", "JSON")),
    "data binary": ("--data binary.txt", ("data", "binary.txt", "UTF-8")),
    "data binary jsonl": ("--data binary.jsonl", ("data", "binary.jsonl", "line 1")),
    "data too short": ("--data short.txt", ("data", "short.txt", "at least 2 rows")),
    "dataset of the hub, offline": ("--data a/stories", ("data: 'a/stories' can't be loaded", "HF_HUB_OFFLINE", "local")),
    "out not empty": ("--out full", ("out", "full", "not empty", "new folder")),
    "out is a file": ("--out short.txt", ("out", "short.txt", "new folder")),
    "out below a file": ("--out short.txt/run", ("out", "short.txt/run", "can't be written")),
    "json in a missing folder": ("--json nowhere/f.json", ("json", "nowhere/f.json", "folder that exists")),
    "json is a folder": ("--json folder", ("json", "folder", "give a file")),
    "resume without out": ("--resume", ("resume: give --out FOLDER", "the run to continue")),
    "resume of what is no run": ("--resume --out full", ("resume", "full", "config.yaml")),
    "resume of nothing": ("--resume --out nowhere", ("resume", "nowhere", "config.yaml")),
}  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_train_refuses(options: str, words: tuple[str, ...], place: Path) -> None:
    (place / "batch.yaml").write_text("stream: {buffer_tokens: 4096}\ntrain: {batch: 4096}\n")
    argv = options.split()
    config = [] if "--resume" in argv or not argv[0].startswith("--") else ["tiny.yaml"]
    out = [] if {"--out", "--resume"} & set(argv) else ["--out", "fresh"]
    refused(place, ("train", *argv, *config, *out), words)


@needs_proc
@pytest.mark.parametrize(("option", "path"), [("out", "/proc/run"), ("json", "/proc/f.json")])
def test_train_refuses_to_write_where_it_may_not(option: str, path: str, place: Path) -> None:
    """Root may write everywhere else; /proc refuses even root. Refused before the work, not when the result is there."""
    refused(place, ("train", "tiny.yaml", *TINY_FLAGS, f"--{option}", path), (option, path, "can't be written"))


def test_refused_train_leaves_no_folder_behind(place: Path) -> None:
    refused(place, ("train", "--layer", "99", "--out", "fresh"), ("layer",))
    assert not (place / "fresh").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes."
        ),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory(error: Exception, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("temposae.engine.sae.SparseAutoencoder.__init__", full)
    argv = ("train", "tiny.yaml", *TINY_FLAGS, "--out", "fresh")
    refused(place, argv, ("memory", "smaller", "sae.d_sae"))


@pytest.mark.parametrize("command", ["", "train", "eval", "bench", "bench step", "testbed sample", "doctor"])
def test_every_command_has_a_short_help_and_the_version(command: str) -> None:
    for option, shows in (("-h", "Usage:"), ("--version", f"temposae {temposae.__version__}")):
        code, out, err = run(*command.split(), option)
        assert (code, err) == (0, "")
        assert out.startswith(shows)


@pytest.mark.parametrize("command", ["", "bench", "testbed"])
def test_help_lists_every_command_with_its_whole_sentence(command: str) -> None:
    listed = re.findall(r"^  (\w+) +(.+)$", run(*command.split(), "--help").out.partition("Options:")[2], re.M)
    assert {"": {"train", "doctor", "bench"}, "bench": {"step", "lr"}, "testbed": {"sample"}}[command] <= dict(
        listed
    ).keys()
    assert [name for name, summary in listed if not summary.endswith(".") or summary.endswith("...")] == []


@pytest.mark.parametrize("command", ["train", "cache", "eval", "features", "dashboard", "run", "campaign"])
def test_help_names_every_kind_of_text(command: str) -> None:
    shown = " ".join(run(command, "--help").out.split())
    assert all(kind in shown for kind in (".txt", ".jsonl", ".parquet", ".npy", "dataset"))


def test_names_with_brackets_and_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from temposae.cli import output

    scores = {
        "explained_variance": 0.5,
        "ce_recovered": 0.5,
        "ce_recovered_over_mean": 0.5,
        "l0": 3.0,
        "dead_fraction": 0.0,
    }
    controls = {"controls": {"[red]x[/red]": {**scores, "top": 0.5}}}
    output.core_table(scores | controls, "of model [v2]/[/x] :smile: \x1b[31m")
    output.scores_table({"top": 0.5, **controls}, "at [bold]hook")
    output.runs_table({"dictionaries": {"[/a]": scores | controls}, "model": "[m]"})
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("[v2]/[/x]", ":smile:", "[red]x[/red]", "at [bold]hook", "[/a]", "of [m]", r"\x1b")
    )


def test_hub_model_offline_is_refused_at_once_and_is_not_taken_for_a_typing_error(place: Path) -> None:
    argv = ("train", "--model", "google/gemma-2-2b", "--out", "fresh")
    words = ("model", "'google/gemma-2-2b'", "can't be loaded", "HF_HUB_OFFLINE is set", "local", "testbed", "smollm2")
    refused(place, argv, words)
    assert "did you mean" not in run(*argv).err


def test_unknown_backend(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOSAE_BACKEND", "tritn")
    words = ("TEMPOSAE_BACKEND", "'tritn'", "torch, triton, auto")
    refused(place, ("train", "tiny.yaml", *TINY_FLAGS, "--out", "fresh"), words)
    code, out, _ = run("doctor")
    assert code != 0
    assert all(word in out for word in words), out


@pytest.mark.parametrize(
    ("argv", "named"), [("train --k many", "--k"), ("train --topk 3", "--topk"), ("tarin", "tarin")]
)
def test_wrong_usage(argv: str, named: str, place: Path) -> None:
    code, out, err = run(*argv.split())
    assert code != 0, out
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


# --- mistakes in the config file

CONFIGS = {
    "not yaml": ("sae: [1, 2", ("config", "bad.yaml", "not YAML")),
    "a list": ("- sae\n- train", ("config", "bad.yaml", "stream, sae, train", "list")),
    "empty": ("", ("config", "bad.yaml", "stream, sae, train")),
    "section is a number": ("sae: 3", ("sae: 3", "section")),
    "section is text": ("stream: testbed", ("stream: 'testbed'", "section")),
    "unknown section": ("trian: {batch: 256}", ("trian", "no such", "train")),
    "unknown setting": ("train: {bacth: 256}", ("train.bacth", "no such setting", "did you mean batch")),
    "unknown setting of a mask": ("sae: {mask: {knid: soft}}", ("sae.mask.knid", "no such setting", "did you mean kind")),
    "number for a section": ("1: 2", ("1", "no such setting", "train")),
    "number for a setting": ("sae: {1: 2}", ("sae.1", "no such setting")),
    "unknown activation": ("sae: {activation: topkk}", ("sae.activation: 'topkk'", "must be topk", "relu")),
    "d_in of another model": ("sae: {d_in: 7}", ("sae.d_in: 7", "hook_resid_post", f"width {WIDTH}")),
    "k above d_sae": ("sae: {d_sae: 64, k: 65}", ("sae.k: 65", "at most", "d_sae (64)")),
    "prefixes don't end with d_sae": (
        "sae: {d_sae: 64, k: 4, prefixes: [8, 32]}",
        ("sae.prefixes: [8, 32]", "ascend", "d_sae (64)"),
    ),
    "prefixes of a relu dictionary": (
        "sae: {d_sae: 64, activation: relu, prefixes: [8, 64]}",
        ("sae.prefixes", "relu", "topk or batchtopk"),
    ),
    "k is text": ("sae: {k: many}", ("sae.k: 'many'", "integer")),
    "negative coefficient": (
        "sae: {activation: relu, l1_coefficient: -0.1}", ("sae.l1_coefficient: -0.1", "a number from 0"),
    ),
    "nan coefficient": ("sae: {aux_coefficient: .nan}", ("sae.aux_coefficient: nan", "finite")),
    "infinite coefficient": ("sae: {l1_coefficient: .inf}", ("sae.l1_coefficient: inf", "finite")),
    "positions beyond the mask": (
        "sae: {mask: {kind: ranges, positions: 64, beyond: error}}",
        ("sae.mask.positions: 64", "at least 128", "clamp or wrap"),
    ),
    "a mask longer than the rows": (
        "stream: {context: 64}\nsae: {mask: {kind: ranges, positions: 128}}",
        ("sae.mask.positions: 128", "rows have 64 positions"),
    ),
    "more ranges than positions": (
        "sae: {mask: {kind: ranges, positions: 2, ranges: 3}}", ("sae.mask.ranges: 3", "at most positions (2)"),
    ),
    "context longer than the model's": ("stream: {context: 129}", ("stream.context: 129", f"at most {LONGEST}")),
    "buffer beyond memory": (f"stream: {{buffer_tokens: {10**13}}}", ("buffer_tokens",)),
    "context of one token": ("stream: {context: 1}", ("stream.context: 1", "an integer from 2")),
    "batch above half the buffer": (
        "{stream: {buffer_tokens: 512}, train: {batch: 257}}", ("train.batch: 257", "at most half", "buffer_tokens (512)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), CONFIGS.values(), ids=CONFIGS)
def test_train_refuses_config(text: str, words: tuple[str, ...], place: Path) -> None:
    (place / "bad.yaml").write_text(text)
    refused(place, ("train", "bad.yaml", "--out", "fresh"), words)


# --- a run, and what is made of it


class Trained(NamedTuple):
    folder: Path
    json: Path
    result: Result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny run of the main job."""
    place = tmp_path_factory.mktemp("trained")
    (place / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = ("--out", place / "run", "--json", place / "figures.json")
    result = run("train", place / "tiny.yaml", *TINY_FLAGS, *flags)
    assert result.code == 0, result.err
    return Trained(place / "run", place / "figures.json", result)


@pytest.fixture
def broken(trained: Trained, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run's checkpoint, to be damaged."""
    shutil.copytree(next(trained.folder.glob("checkpoints/step_*")), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_train_writes_a_run(trained: Trained) -> None:
    run_files = set(files(trained.folder))
    assert run_files == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.md",
        "report.html",
        "evals/core.json",
        f"evals/saebench/core/temposae_{trained.folder.name}_eval_results.json",
        *(
            f"figures/{name}.{kind}"
            for name in ("loss_curve", "position_explained_variance", "firing_rates")
            for kind in ("png", "pdf")
        ),
        *(f"checkpoints/step_00000016/{name}.safetensors" for name in ("sae", "random", "state", "stream")),
        "checkpoints/step_00000016/checkpoint.json",
    }
    begins = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert all(data[:4] == begins[Path(name).suffix] for name, data in files(trained.folder / "figures").items()), (
        run_files
    )


def test_others_may_read_a_run_as_the_umask_says(trained: Trained) -> None:
    os.umask(before := os.umask(0))
    modes = {path.stat().st_mode & 0o777 for path in trained.folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~before}


def test_train_resolves_its_config(trained: Trained) -> None:
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert config["stream"]["hook"] == "blocks.1.hook_resid_post"
    assert config["sae"].items() >= {"d_in": WIDTH, "d_sae": 64, "k": 4, "activation": "topk"}.items()
    assert config["train"].items() >= {"tokens": 4096, "batch": 256, "seed": 0}.items()


def test_train_reports_metrics(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(step, 256 * step) for step in (4, 8, 12, 16)]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert {"loss", "l0", "fvu"} <= lines[0]["random"].keys()


def test_summary(trained: Trained) -> None:
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert summary.keys() >= {*SCORES, "seconds", "controls"}
    assert summary["controls"].keys() == {"random", "lm_neurons", "mean"}
    assert all(scores.keys() >= set(SCORES) for scores in summary["controls"].values())
    assert json.loads(trained.json.read_text()) == summary
    core = json.loads((trained.folder / "evals" / "core.json").read_text())
    assert {key: summary[key] for key in SCORES} == {key: core[key] for key in SCORES}
    assert summary["controls"]["mean"]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert summary["explained_variance"] > summary["controls"]["random"]["explained_variance"] > 0
    assert summary["l0"] <= 4
    assert 0 < summary["seconds"] < 600


def test_train_prints_a_table(trained: Trained) -> None:
    out = re.sub(r"\s+", " ", trained.result.out)
    for word in ("explained", "CE recovered", "L0", "dead", "dictionary", "random", "mean", "run folder:", "figures:"):
        assert word in out, out
    assert "Traceback" not in trained.result.err


def test_eval_gives_the_figures_of_the_run(trained: Trained, tmp_path: Path) -> None:
    before = files(trained.folder)
    result = run("eval", "core", "--sae", trained.folder, "--fresh", "--json", tmp_path / "again.json")
    assert result.code == 0, result.err
    again, first = (
        without_seconds(data) for data in ((tmp_path / "again.json").read_bytes(), before["evals/core.json"])
    )
    assert again == first
    written = files(trained.folder)
    for name in ("evals/core.json", f"evals/saebench/core/temposae_{trained.folder.name}_eval_results.json"):
        assert without_seconds(written.pop(name)) == without_seconds(before.pop(name))
    for name, time in (("report.md", b"## Time"), ("report.html", b'id="time"')):  # what it took stands at the end
        assert written.pop(name).rpartition(time)[0] == before.pop(name).rpartition(time)[0] != b""
    assert written == before


def without_seconds(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    found.get("eval_result_unstructured", {}).get("temposae", {}).pop("seconds", None)
    return {key: value for key, value in found.items() if key not in ("sha256", "seconds", "datetime_epoch_millis")}


def test_train_refuses_to_overwrite_a_run(trained: Trained) -> None:
    refused(trained.folder, ("train", *TINY_FLAGS, "--out", trained.folder), ("out", str(trained.folder), "--resume"))


def test_resume_takes_no_other_settings(trained: Trained) -> None:
    argv = ("train", "--resume", "--out", trained.folder, "--k", "5")
    refused(trained.folder, argv, ("resume", "give only --out, --resume and --plugin"))


@pytest.mark.parametrize("path", ["nowhere", "folder", "short.txt"])
def test_eval_refuses_what_is_no_dictionary(path: str, place: Path) -> None:
    refused(place, ("eval", "core", "--sae", path), ("sae", path, "checkpoint", "run"))


def cut_in_half(folder: Path) -> None:
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(folder: Path) -> None:
    path = folder / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lose_the_tensors(folder: Path) -> None:
    (folder / "sae.safetensors").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(path.read_text()[:200])


def binary_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_bytes(b"\xff\xfe\x00\x81")


def list_for_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("[1, 2]")


def empty_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("{}")


def later_format(folder: Path) -> None:
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"format": "temposae/99"}))


def other_settings(folder: Path) -> None:
    path = folder / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["dictionaries"]["sae"]["d_sae"] += 1
    path.write_text(json.dumps(manifest))


DAMAGE = {
    cut_in_half: ("sae.safetensors", "damaged", "bytes"),
    flip_a_byte: ("sae.safetensors", "damaged"),
    lose_the_tensors: ("sae.safetensors", "missing"),
    cut_the_manifest: ("checkpoint.json", "damaged"),
    binary_manifest: ("checkpoint.json", "damaged"),
    list_for_manifest: ("checkpoint.json", "damaged"),
    empty_manifest: ("checkpoint.json", "damaged"),
    later_format: ("temposae/99", "temposae/1"),
    other_settings: ("sae.safetensors", "does not fit"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_eval_refuses_a_damaged_checkpoint(damage: Any, broken: Path) -> None:
    damage(broken)
    refused(broken, ("eval", "core", "--sae", broken), ("checkpoint", *DAMAGE[damage]))


def test_eval_refuses_a_dictionary_of_another_width(tmp_path: Path) -> None:
    temposae.save(temposae.SparseAutoencoder(temposae.SAEConfig(d_in=24, d_sae=48, k=4)), tmp_path / "narrow")
    words = ("sae: d_in = 24", "hook_resid_post", f"width {WIDTH}")
    refused(tmp_path, ("eval", "core", "--sae", tmp_path / "narrow", "--model", "testbed"), words)


def test_eval_needs_a_model_for_a_lone_dictionary(tmp_path: Path) -> None:
    temposae.save(temposae.SparseAutoencoder(temposae.SAEConfig(d_in=24, d_sae=48, k=4)), tmp_path / "lone")
    refused(tmp_path, ("eval", "core", "--sae", tmp_path / "lone"), ("model", "lone", "--model", "--layer"))


EVAL_OPTIONS = {
    "unknown model": ("--model testbet", ("model", "'testbet'", "did you mean testbed")),
    "unknown hook": ("--hook blocks.1.hook_resid_pots", ("hook", "blocks.1.hook_resid_post")),
    "layer too high": ("--layer 4", ("layer: 4", f"0 to {LAYERS - 1}")),
    "layer and hook": ("--layer 1 --hook blocks.1.hook_resid_post", ("hook", "layer", "not both")),
    "data missing": ("--data ./shirt.txt", ("data", "./shirt.txt", "does not exist")),
    "json in a missing folder": ("--json nowhere/f.json", ("json", "nowhere/f.json", "folder that exists")),
}


@pytest.mark.parametrize(("options", "words"), EVAL_OPTIONS.values(), ids=EVAL_OPTIONS)
def test_eval_refuses(options: str, words: tuple[str, ...], trained: Trained) -> None:
    refused(trained.folder, ("eval", "core", "--sae", trained.folder, *options.split()), words)


# --- the other commands


def test_doctor(tmp_path: Path) -> None:
    code, out, err = run("doctor", "--json", tmp_path / "doctor.json")
    assert code == 0, err
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found.keys() >= {"temposae", "python", "torch", "triton", "gpu", "backend", "why"}
    assert found["temposae"] == temposae.__version__
    assert all(key in out for key in found)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_full_disk(place: Path) -> None:
    refused(place, ("doctor", "--json", "/dev/full"), ("json", "/dev/full", "No space left"))


def test_testbed_sample(tmp_path: Path) -> None:
    code, out, err = run("testbed", "sample", "--count", "2", "--start", "5", "--json", tmp_path / "sample.json")
    assert code == 0, err
    documents = json.loads((tmp_path / "sample.json").read_text())["documents"]
    assert [document["text"] for document in documents] == [text for text in out.split("\n\n") if text]
    assert len(documents) == 2
    assert run("testbed", "sample", "--count", "1", "--start", "6").out.strip() == documents[1]["text"]


def test_testbed_sample_refuses(place: Path) -> None:
    refused(place, ("testbed", "sample", "--correlation", "2"), ("correlation: 2", "at least 0 and at most 1"))


def test_as_a_program(tmp_path: Path) -> None:
    """Nothing that a library prints or warns about comes between the person and the one line."""
    argv = [sys.executable, "-m", "temposae", "train", "--layer", "99", "--out", str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: layer: 99 is not allowed; testbed has layers 0 to {LAYERS - 1}"]
    assert done.stdout == ""


# --- several dictionaries


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny sweep, one of whose dictionaries diverges."""
    place = tmp_path_factory.mktemp("swept")
    bad = {"name": "bad", "lr": 10, "beta2": 0.0, "clip_norm": None}
    several = {"dictionaries": [{"k": 4}, {"layer": 2, "activation": "batchtopk"}, bad]}
    (place / "sweep.yaml").write_text(yaml.safe_dump(TINY | several, sort_keys=False))
    result = run(
        "train", place / "sweep.yaml", *TINY_FLAGS[:-2], "--out", place / "run", "--json", place / "figures.json"
    )
    assert result.code == 0, result.err
    return Trained(place / "run", place / "figures.json", result)


def test_a_sweep_leaves_a_run_for_each_and_a_comparison(swept: Trained) -> None:
    names = ("k4", "layer2_batchtopk")
    summary = json.loads(swept.json.read_text())
    assert json.loads((swept.folder / "summary.json").read_text()) == summary
    assert list(summary["dictionaries"]) == [*names, "bad"]
    assert "train.lr: 10 made" in summary["dictionaries"]["bad"]["failed"]
    for name, layer in zip(names, (1, 2), strict=True):
        scores = summary["dictionaries"][name]
        assert scores["hook"] == f"blocks.{layer}.hook_resid_post"
        assert scores["explained_variance"] > scores["controls"]["random"]["explained_variance"] > 0
        core = json.loads((swept.folder / name / "evals" / "core.json").read_text())
        assert core["explained_variance"] == scores["explained_variance"]
        assert core["hook"] == scores["hook"]
    assert (swept.folder / "figures" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    out = re.sub(r"\s+", " ", swept.result.out)
    for word in (*names, "random EV", "bad was stopped: train.lr: 10", "run folder:"):
        assert word in out, out


def test_one_of_a_sweep_is_a_run_like_any_other(swept: Trained, tmp_path: Path) -> None:
    result = run("eval", "core", "--sae", swept.folder / "layer2_batchtopk", "--json", tmp_path / "again.json")
    assert result.code == 0, result.err
    again = json.loads((tmp_path / "again.json").read_text())
    summary = json.loads(swept.json.read_text())["dictionaries"]["layer2_batchtopk"]
    assert again["explained_variance"] == summary["explained_variance"]


@pytest.mark.slow
def test_a_sweep_that_is_done_can_be_resumed_to_the_same(swept: Trained, tmp_path: Path) -> None:
    shutil.copytree(swept.folder, tmp_path / "run")
    result = run("train", "--resume", "--out", tmp_path / "run", "--json", tmp_path / "again.json")
    assert result.code == 0, result.err
    first, again = (json.loads(path.read_text())["dictionaries"] for path in (swept.json, tmp_path / "again.json"))
    assert first == again


def test_a_sweep_as_a_whole_is_no_dictionary(swept: Trained) -> None:
    refused(swept.folder, ("eval", "core", "--sae", swept.folder), ("has no 'sae'", "the stream of k4"))
