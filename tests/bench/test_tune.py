"""Tuning: what is tried, what is chosen, and what is written. The timer is made up; kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench import tune
from temposae.bench.data import DTYPES, Shape
from temposae.engine.errors import UserError
from temposae.kernels import backend
from temposae.kernels.backend import config_row
from temposae.kernels.configs import CONFIGS

pytest.importorskip("triton")
SHAPE = Shape(N=32, D=32, F=128, K=8)  # enough entries for a window
TEXT = tune.FILE.read_text()


def load(text: str) -> dict[int, dict[str, dict[str, int]]]:
    found: dict[str, Any] = {}
    exec(text, found)
    return found["CONFIGS"]


# --- the file


def test_the_file_is_as_it_is_written() -> None:
    assert tune.render(TEXT, CONFIGS) == TEXT
    assert load(TEXT) == CONFIGS


def test_only_a_changed_setting_changes_the_file() -> None:
    entry, setting = "above_cut", dict(BLOCK=512, num_warps=2)
    text = tune.render(TEXT, CONFIGS | {100: CONFIGS[100] | {entry: setting}})
    changed = [line for line in text.splitlines() if line not in TEXT.splitlines()]
    assert changed == ['    "above_cut": dict(BLOCK=512, num_warps=2),']
    assert load(text) == CONFIGS | {100: CONFIGS[100] | {entry: setting}}
    assert tune.render(text, CONFIGS) == TEXT


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_other_rows_keep_their_values(arch: int) -> None:
    """Also those that inherit from the row that is tuned, and those next to a new one."""
    changed = CONFIGS | {arch: CONFIGS[80] | {entry: dict(new=1) for entry in CONFIGS[80]}}
    text = tune.render(TEXT, changed)
    assert load(text) == changed
    assert tune.render(text, changed) == text
    assert text.startswith(TEXT.partition(tune.ROWS)[0])


def test_what_is_no_table_is_not_written_over() -> None:
    with pytest.raises(UserError, match="^configs: .* must hold the line"):
        tune.render("CONFIGS = {}", CONFIGS)


# --- the choice


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tune.Choice]]:
    """tuned(entries, ms=f): tunes with the time f(setting) for the entry's setting in effect; no kernel runs."""
    monkeypatch.setattr(tune, "Inputs", lambda shape, dtype, device: type("Inputs", (), {"dtype": dtype}))
    for entry, trial in tune.TRIALS.items():
        monkeypatch.setitem(tune.TRIALS, entry, trial._replace(call=lambda inputs, entry=entry: lambda: entry))

    def run(
        entries: list[str],
        ms: Callable[[dict[str, int]], float],
        obstacle: Any = lambda entry, arch: "",
        arch: int = 80,
    ):
        def timer(call: Any, kernels: set[str]) -> float:
            return ms(config_row(arch)[call()])

        return tune.tune(arch, entries, SHAPE, "cpu", timer, obstacle)

    return run


def test_a_better_setting_is_picked_and_written(tuned: Callable[..., list[tune.Choice]]) -> None:
    table = {arch: dict(row) for arch, row in CONFIGS.items()}
    (choice,) = tuned(["above_cut"], lambda s: 1.0 if s == dict(BLOCK=1024, num_warps=8) else 2.0, arch=90)
    assert choice == tune.Choice("above_cut", CONFIGS[90]["above_cut"], 2.0, dict(BLOCK=1024, num_warps=8), 1.0, 8, {})
    assert table == CONFIGS  # nothing is in effect any more
    text = tune.render(TEXT, CONFIGS | {90: tune.tuned_row(90, [choice])})
    assert '    "above_cut": dict(BLOCK=1024, num_warps=8),' in text.partition("CONFIGS[90] =")[2]
    assert load(text) == table | {90: table[90] | {"above_cut": dict(BLOCK=1024, num_warps=8)}}
    shown = tune.summary([choice]).splitlines()[2]
    assert [cell.strip() for cell in shown.strip("|").split("|")] == [
        "above_cut",
        "2",
        "1",
        "8",
        "0",
        "BLOCK=1024, num_warps=8",
    ]


def test_what_is_hardly_faster_is_not_picked(tuned: Callable[..., list[tune.Choice]]) -> None:
    (choice,) = tuned(["above_cut"], lambda s: 2.0 if s == CONFIGS[80]["above_cut"] else 1.97)
    assert choice.after == choice.before == CONFIGS[80]["above_cut"]
    assert choice.after_ms == 2.0
    assert tune.render(TEXT, CONFIGS | {80: tune.tuned_row(80, [choice])}) == TEXT


def test_settings_that_fail_are_passed_over(tuned: Callable[..., list[tune.Choice]]) -> None:
    def ms(setting: dict[str, int]) -> float:
        if setting["BLOCK"] == 512:
            raise RuntimeError("out of resource: shared memory\nReducing block sizes may help")
        return setting["BLOCK"] / 1024

    (choice,) = tuned(["above_cut"], ms)
    assert choice.after == dict(BLOCK=1024, num_warps=4)
    reason = "RuntimeError: out of resource: shared memory"
    assert choice.refused == {"BLOCK=512, num_warps=4": reason, "BLOCK=512, num_warps=8": reason}


def test_a_broken_setting_in_the_table_is_an_error(tuned: Callable[..., list[tune.Choice]]) -> None:
    def broken(setting: dict[str, int]) -> float:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        tuned(["above_cut"], broken)


def test_the_next_best_is_picked_where_the_best_may_not_be(tuned: Callable[..., list[tune.Choice]]) -> None:
    asked: list[dict[str, int]] = []

    def obstacle(entry: str, arch: int) -> str:
        asked.append(config_row(arch)[entry])
        return "above_cut spills 8 bytes" if config_row(arch)[entry]["BLOCK"] == 512 else ""

    (choice,) = tuned(["above_cut"], lambda s: s["BLOCK"] - 20 * s["num_warps"], obstacle)
    refused = [dict(BLOCK=512, num_warps=warps) for warps in (8, 4)]
    assert asked == [*refused, dict(BLOCK=1024, num_warps=8)]
    assert choice.after == dict(BLOCK=1024, num_warps=8)
    assert set(choice.refused.values()) == {"above_cut spills 8 bytes"}
    assert len(choice.refused) == 2


def test_entries_are_tuned_with_those_before_in_effect(tuned: Callable[..., list[tune.Choice]]) -> None:
    seen: set[int] = set()

    def ms(setting: dict[str, int]) -> float:
        if "BLOCK_T" in setting:
            seen.add(config_row(80)["above_cut"]["BLOCK"])
        return setting.get("BLOCK", 1)

    choices = tuned(["rescan", "above_cut"], ms)  # whatever the order asked for
    assert [choice.entry for choice in choices] == ["above_cut", "rescan"]
    assert seen == {512}


def test_an_architecture_without_a_row_gets_one(tuned: Callable[..., list[tune.Choice]]) -> None:
    config_row.cache_clear()
    with pytest.warns(UserWarning, match="no launch configurations for sm_86"):
        (choice,) = tuned(["above_cut"], lambda s: s["BLOCK"], arch=86)
    assert 86 not in CONFIGS
    text = tune.render(TEXT, CONFIGS | {86: tune.tuned_row(86, [choice])})
    assert load(text)[86] == CONFIGS[80] | {"above_cut": dict(BLOCK=512, num_warps=4)}


# --- the grid


def test_every_entry_has_a_grid_of_settings_that_it_takes() -> None:
    assert tune.TRIALS.keys() == CONFIGS[80].keys()
    for row in CONFIGS.values():
        for entry, trial in tune.TRIALS.items():
            assert trial.grid.keys() <= row[entry].keys()
            grid = tune.settings(entry, row[entry])
            assert grid[0] == row[entry]
            assert 1 < len(grid) <= 33
            assert len({tuple(setting.items()) for setting in grid}) == len(grid)


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "fp32"])
def test_every_call_launches_its_entry_and_leaves_the_weights(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interpreter: the entry's setting is asked for, and the weights are as before."""
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")
    asked: list[str] = []

    class TrackedTensors(dict):
        def __getitem__(self, entry: str) -> dict[str, int]:
            asked.append(entry)
            return super().__getitem__(entry)

    monkeypatch.setitem(CONFIGS, 80, TrackedTensors(CONFIGS[80]))
    inputs = tune.Inputs(SHAPE, DTYPES[dtype], "cpu")
    weights = {name: value.detach().clone() for name, value in inputs.sae.state_dict().items()}
    for entry, trial in tune.TRIALS.items():
        if trial.dtype == dtype and entry != "encode_topk_persistent":  # only a GPU runs that: tests/gpu
            call = trial.call(inputs)
            asked.clear()
            call()
            assert entry in asked
    assert all(torch.equal(inputs.sae.state_dict()[name], value) for name, value in weights.items())


def test_settings_reach_the_kernels_where_torch_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real run of one entry, in the interpreter: what is timed is launched by the setting that is tried."""
    monkeypatch.setenv("TEMPOSAE_BACKEND", "torch")
    monkeypatch.setitem(tune.TRIALS, "above_cut", tune.TRIALS["above_cut"]._replace(grid=dict(BLOCK=(512, 2048))))
    launched: list[dict[str, Any]] = []
    original = backend.launch_options

    def watched(op: str, tensor: torch.Tensor) -> dict[str, Any]:
        if op == "above_cut":
            launched.append(original(op, tensor))
        return original(op, tensor)

    monkeypatch.setattr("temposae.kernels.encode_sparse.ragged.launch_options", watched)

    def timer(call: Any, kernels: set[str]) -> float:
        assert kernels == {"above_cut_kernel"}
        call()
        return launched[-1]["BLOCK"]

    (choice,) = tune.tune(80, ["above_cut"], SHAPE, "cpu", timer, lambda entry, arch: "")
    assert len(launched) >= choice.tried == 3
    assert choice.after == dict(BLOCK=512, num_warps=4)
    assert os.environ["TEMPOSAE_BACKEND"] == "torch"


# --- what may not be in the table


@pytest.mark.slow
def test_shared_memory_and_spills_are_obstacles() -> None:
    """In a process of its own, because this one interprets kernels instead of compiling them."""
    code = """
from temposae.bench import tune
from temposae.kernels.configs import CONFIGS
row = CONFIGS[80]
def says(entry, **changes):
    with tune.in_effect(80, row | {entry: row[entry] | changes}):
        print(tune.obstacle(entry, 80))
says("above_cut")
says("encode", BLOCK_D=128, num_stages=4)
says("encode", num_warps=1)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fine, large, spilled = done.stdout.split("\n")[:3]
    assert fine == ""
    assert "bytes of shared memory, more than 101376" in large
    assert "spills" in spilled


def test_run_writes_the_row_of_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "configs.py"
    path.write_text(TEXT)
    better = CONFIGS[90]["above_cut"] | dict(num_warps=8)
    monkeypatch.setattr(tune, "FILE", path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        tune, "tune",
        lambda arch, names, *_: [tune.Choice(name, CONFIGS[arch][name], 2.0, better, 1.0, 8, {}) for name in names],
    )  # fmt: skip
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        tune.run(["above_cut"])
    assert path.read_text() == TEXT
    monkeypatch.delenv("TRITON_INTERPRET")
    assert [choice.entry for choice in tune.run(["above_cut", "above_cut"])] == ["above_cut"]
    assert load(path.read_text()) == CONFIGS | {90: CONFIGS[90] | {"above_cut": better}}
