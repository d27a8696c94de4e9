"""Ground truth of `make demo`'s recipe over training seeds, on a fifth of its tokens."""

import pytest
import temposae as ts

from ..commandline import run

pytestmark = pytest.mark.slow
RECIPE = ["train", "--activation", "batchtopk", "--d-sae", "2048", "--k", "16", "--lr", "0.0008", "--no-eval"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_trained_dictionary_recovers_more_than_its_controls(seed, tmp_path):
    code, _, err = run(*RECIPE, "--tokens", "200000", "--seed", str(seed), "--out", tmp_path / "run")
    assert code == 0, err
    found = ts.evaluate(tmp_path / "run", "ground_truth")["ground_truth"]
    controls = {name: scores["recovered"] for name, scores in found["controls"].items()}
    assert set(controls) == {"random", "lm_neurons", "shuffled"}
    assert all(found["recovered"] >= recovered + 0.2 for recovered in controls.values()), controls
    assert found["intervals"]["recovered"]["above_random"]["low"] > 0.1
    assert controls["shuffled"] < 0.1
