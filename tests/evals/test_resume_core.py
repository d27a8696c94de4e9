"""An interrupted measurement of `core` continues after the last rows whose effects were saved."""

import pytest
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.evals import held_out
from temposae.evals.core import core
from temposae.evals.held_out import SavedEffects

ROWS = 12
KEY = {"dictionary": "a", "seed": 0}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(stop_after=None, rows_per_forward=3, **key): results of `core`, and of how many rows the model ran."""
    monkeypatch.setattr(held_out, "SAVE_SECONDS", 0)
    losses_and_kl = held_out.losses_and_kl
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4))
    model = LanguageModel("testbed", device="cpu")
    rows_run: list[int] = []

    def make(stop_after=None, rows_per_forward=3, **key):
        rows_run.clear()

        def losses(model, tokens, *rest):
            if stop_after is not None and sum(rows_run) >= stop_after:
                raise KeyboardInterrupt
            rows_run.append(len(tokens))
            return losses_and_kl(model, tokens, *rest)

        monkeypatch.setattr(held_out, "losses_and_kl", losses)
        stream = ActivationStream(StreamConfig(rows_per_forward=rows_per_forward), tokens=4096, model=model)
        saved = SavedEffects(tmp_path / "evals" / "core.part", {**KEY, **key})
        return core(stream, sae, {}, rows=ROWS, ce_rows=ROWS, saved=saved), sum(rows_run)

    return make


def test_a_measurement_continues_with_the_same_result(measure, tmp_path):
    expected, rows = measure()
    assert rows == ROWS
    assert not list((tmp_path / "evals").iterdir())
    with pytest.raises(KeyboardInterrupt):
        measure(stop_after=7)
    assert (tmp_path / "evals" / "core.part").is_file()
    found, rows = measure()
    assert found == expected
    assert rows == ROWS - 9  # batches of three rows
    assert not list((tmp_path / "evals").iterdir())


def test_it_continues_in_batches_of_another_size(measure):
    with pytest.raises(KeyboardInterrupt):
        measure(stop_after=3)
    found, rows = measure(rows_per_forward=12)
    assert rows == ROWS - 3
    assert found["ce"]["sae"] == pytest.approx(measure()[0]["ce"]["sae"], rel=1e-6)


@pytest.mark.parametrize("change", ["another dictionary", "a flipped bit", "a cut"])
def test_what_was_saved_of_something_else_or_is_damaged_is_not_used(measure, tmp_path, change):
    expected, _ = measure()
    with pytest.raises(KeyboardInterrupt):
        measure(stop_after=6)
    path = tmp_path / "evals" / "core.part"
    raw = bytearray(path.read_bytes())
    if change == "a flipped bit":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif change == "a cut":
        path.write_bytes(raw[: len(raw) // 2])
    found, rows = measure(**({"dictionary": "b"} if change == "another dictionary" else {}))
    assert (found, rows) == (expected, ROWS)
