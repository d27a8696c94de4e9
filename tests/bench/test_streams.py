"""The stream bench: what its JSON holds, and that each ratio tells of what it is about."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench import streams
from temposae.engine.errors import UserError
from temposae.engine.stream import LanguageModel
from temposae.engine.stream.buffer import RingBuffer
from temposae.engine.stream.model_source import ModelSource

from ..commandline import run

TINY = streams.PRESETS["tiny"]._replace(rounds=3, F=16, K=2)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DICTIONARIES", (1, 2))


def slower(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, seconds: float) -> None:
    call = getattr(kind, name)

    def sleeps(*args: Any) -> Any:
        time.sleep(seconds)
        return call(*args)

    monkeypatch.setattr(kind, name, sleeps)


@pytest.mark.slow
def test_a_slow_source_harvests_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes some 30 ms; with 0.2 s on top the bare loop is several times as fast."""
    monkeypatch.setattr(streams, "DICTIONARIES", ())
    slower(monkeypatch, ModelSource, "next", 0.2)
    assert streams.measure(TINY, device="cpu")["harvest_ratio"] < 0.5


@pytest.mark.slow
def test_a_slow_buffer_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DICTIONARIES", (1,))
    slower(monkeypatch, RingBuffer, "_gather", 0.2)
    found = streams.measure(TINY, device="cpu")
    assert found["buffer_overhead"] > 1
    assert found["harvest_ratio"] > 0.5
    assert found["end_to_end"]["1"] < 0.5


def test_json_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DICTIONARIES", (1, 8, 32))
    code, out, err = run("bench", "streams", "--preset", "tiny", "--device", "cpu", "--json", tmp_path / "s.json")
    assert code == 0, err
    found = json.loads((tmp_path / "s.json").read_text())
    assert found.keys() == {
        "device", "versions", "commit", "when", "threads", "streams", "harvest_ratio", "buffer_overhead", "end_to_end",
    }  # fmt: skip
    inside = found["streams"]
    for key in ("harvest_ratio", "buffer_overhead", "end_to_end"):
        assert inside[key] == found[key]
    assert list(found["end_to_end"]) == list(inside["batch_over_sum"]) == list(inside["step_ms"]) == ["1", "8", "32"]
    assert 0 < found["harvest_ratio"] < 3
    assert found["end_to_end"]["32"] < found["end_to_end"]["1"]
    assert inside.items() >= {"model": "testbed", "hook": "blocks.1.hook_resid_post", "F": 64, "D": 128}.items()
    assert re.search(rf"^\| harvest / bare +\| +{found['harvest_ratio']:.3f} \|", out, re.MULTILINE)


def test_refused() -> None:
    for argv, words in (
        (("--preset", "huge"), "preset: 'huge' is not allowed; there are tiny, cpu, gpu"),
        (("--model", streams.GEMMA), f"model: {streams.GEMMA} is not allowed on cpu"),
        (("--json", "nowhere/f.json"), "json: nowhere/f.json"),
        (("--device", "tpu"), "device: 'tpu'"),
    ):
        code, _, err = run("bench", "streams", "--device", "cpu", *argv)
        assert code == 2
        assert err.startswith(f"error: {words}")
        assert len(err.splitlines()) == 1


def test_a_bare_loop_over_other_activations_is_refused(testbed: LanguageModel) -> None:
    bare = streams.BareModel("testbed", testbed)
    rows = streams.TestbedRows(64).next(2)
    bare.check(testbed, rows)
    with torch.no_grad():
        next(bare.model.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="differ from the stream's"):
        bare.check(testbed, rows)
    with pytest.raises(UserError, match="transformers alone cannot read blocks.1.hook_mlp_out"):
        streams.BareModel("testbed", LanguageModel("testbed", hook="blocks.1.hook_mlp_out"))


def test_the_gpus_model_in_small(tmp_path: Path) -> None:
    """Gemma-2-2B's folder with sizes changed: it loads, is read from transformers, and gets random text."""
    small = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    streams.gemma(tmp_path, "cpu", torch.float32, **small, head_dim=16, intermediate_size=64, vocab_size=300)
    found = streams.measure(TINY._replace(model=str(tmp_path), layer=1), device="cpu")
    inside = found["streams"]
    assert (inside["reader"], inside["D"], inside["hook"]) == ("transformers", 32, "blocks.1.hook_resid_post")
