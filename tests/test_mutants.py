"""Hostile settings and arguments on the command line: one line that names the setting, no long work, nothing written."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from temposae.cli import app

from .commandline import Result, run
from .mutants import LONG, arguments, configs, texts

SAYS = re.compile(r"must|did you mean|there (is|are)|give|at most|needs?|requires|is for|no such|have none|is not YAML")
#: what every command begins long work with
WORK = (
    "bench.step.measure", "bench.ops.measure", "bench.streams.measure", "bench.documented_runs.measure", "bench.profile.run",
    "bench.learning_rate.measure", "bench.before_after.measure", "bench.report.write", "bench.tune.run",
    "engine.testbed.training.train", "engine.testbed.language.Language", "engine.stream.model.LanguageModel.__init__",
    "engine.interchange.hub.fetch",
)  # fmt: skip


class Began(BaseException):
    """Long work would begin now: the command line was accepted."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, from which no long work can begin."""

    def begin(*_: Any, **__: Any) -> None:
        raise Began

    for name in WORK:
        module, _, function = name.rpartition(".")
        owner, _, cls = module.rpartition(".") if "LanguageModel" in name else (module, "", "")
        found = importlib.import_module(f"temposae.{owner}")
        monkeypatch.setattr(getattr(found, cls) if cls else found, function, begin)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def refused(place: Path, argv: list[str], name: str, allowed: set[str]) -> list[str]:
    """What is wrong with how `temposae ARGV`, which can't be, is refused; `name` is what to name."""
    try:
        result = run(*argv)
    except Began:
        return ["it was accepted"]
    wrong = said_well(result, name)
    there = {str(path.relative_to(place)) for path in place.rglob("*") if path != place / "here"}
    return wrong + ([f"it left {there - allowed}"] if there - allowed else [])


def said_well(result: Result, name: str) -> list[str]:
    line = result.err
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name[:90]
    return [
        why
        for why, is_so in (
            (f"exit code {result.code}", result.code != 2),
            (f"several lines: {line}", line.count("\n") != 1 or not line.startswith("error: ")),
            (f"escapes: {line!r}", not line.rstrip("\n").isprintable()),
            (f"long: {line}", len(line) > 900 or LONG[:301] in line),
            (f"{name} is not named: {line}", shown not in line),
            (f"nothing is said to be allowed: {line}", SAYS.search(line) is None),
        )
        if is_so
    ]


def run_configs(place: Path, seed: int, count: int) -> list[tuple[Any, ...]]:
    wrong = []
    for mutant in configs(seed, count):
        Path("c.yaml").write_text(yaml.safe_dump(mutant.settings, sort_keys=False))
        found = refused(place, ["train", "c.yaml", "--out", "fresh"], mutant.name, {"here/c.yaml"})
        wrong += [(mutant, why) for why in found]
    Path("c.yaml").unlink()
    return wrong


def run_arguments(place: Path, seed: int, count: int) -> list[tuple[Any, ...]]:
    commands: dict[tuple[str, ...], Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        inner = getattr(command, "commands", None)
        commands |= {(name,): command} if inner is None else {(name, each): inner[each] for each in inner}
    wrong = []
    for argv, label in arguments(seed, count, commands):
        wrong += [(argv, why) for why in refused(place, argv, label, set())]
    return wrong


def test_settings_that_can_t_be_are_refused_by_name(place: Path) -> None:
    assert run_configs(place, seed=0, count=150) == []


def test_arguments_that_can_t_be_are_refused_by_name(place: Path) -> None:
    assert run_arguments(place, seed=0, count=400) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_settings_that_can_t_be_are_refused_by_name(place: Path, seed: int) -> None:
    assert run_configs(place, seed, count=600) == []
    assert run_arguments(place, seed, count=400) == []


def test_files_that_are_no_settings_are_refused_by_line(place: Path) -> None:
    """One line, or what they say is allowed; and quickly, whatever they would grow to."""
    wrong = []
    for text in texts(seed=0, count=60):
        Path("c.yaml").write_bytes(text)
        try:
            result = run("train", "c.yaml", "--out", "fresh")
        except Began:
            continue
        wrong += [(text[:80], why) for why in said_well(result, "")]
    assert wrong == []
    assert sorted(path.name for path in place.rglob("*")) == ["c.yaml", "here"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("bench", "step", "--preset", ""), ("--preset", "must not be empty")),
        (("bench", "step", "--n", "١"), ("--n: '١'", "whole numbers")),
        (("bench", "step", "--n", "1,,2"), ("--n: '1,,2'", "whole numbers")),
        (("profile", "--n", "1,2"), ("--n", "2 shapes are not allowed")),
        (("dashboard", "--sae", "x", "--rows", "9" * 21), ("--rows", "at most 1,048,576")),
        (("features", "--sae", "x", "--out", "y", "--tokens", str(10**21)), ("--tokens", "at most")),
        (("eval", "positions", "--sae", "x", "--file", "blimp=/nope"), ("--file blimp", "/nope", "does not exist")),
        (("eval", "sparse_probing", "--sae", "x", "--set", "nope.csv"), ("--set", "nope.csv", "does not exist")),
        (("train", "--out", "~nouser/x"), ("--out", "~nouser/x", "no user nouser")),
        (("bench", "lr", "--cell", "topk,٣,4,5,6"), ("cell", "ACTIVATION,F,K,BATCH,STEPS")),
        (("bench", "lr", "--source", "a=no.npy"), ("source", "no.npy does not exist")),
        (("cache", "--out", "c", "--data", "./no.txt"), ("data", "./no.txt does not exist")),
        (("train", "--data", "./no.txt"), ("data", "./no.txt does not exist")),
    ],
)
def test_an_argument_is_looked_at_before_anything_long(
    place: Path, argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = run(*argv)
    assert said_well(result, "") in ([], [f"nothing is said to be allowed: {result.err}"])
    assert [word for word in words if word not in result.err] == []
    assert list(place.rglob("*")) == [place / "here"]


def test_an_ordinary_process_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {tokens: true}\n")
    for argv, words in (
        (["c.yaml"], "train.tokens: True"),
        (["--k", "4 "], "--k: '4 '"),
        (["--nope"], "--nope: no such option"),
    ):
        command = [sys.executable, "-m", "temposae", "train", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {words}")
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
