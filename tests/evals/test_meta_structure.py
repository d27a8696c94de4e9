"""Dictionaries whose decoder rows share directions by construction, and some whose rows share nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream
from temposae.evals import meta_recipes
from temposae.evals import meta_structure as module
from temposae.evals.evaluation import Evaluation, TextActivations
from temposae.evals.meta_recipes import LEAST, OWN, RATIO, RECIPES, SAEBENCH, K
from temposae.evals.meta_structure import meta_structure
from temposae.evals.row_budget import Sizes
from temposae.evals.run_evals import EvalOptions, _inputs

D, SHARED, F = 32, 16, 1050
FEWEST, SPLIT, STEPS, BATCH = (getattr(RECIPES[OWN], name) for name in ("fewest", "split", "steps", "batch"))


def changed(patch: pytest.MonkeyPatch, name: str = OWN, **changes: Any) -> None:
    patch.setitem(RECIPES, name, replace(RECIPES[name], **changes))


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
    changed(monkeypatch, steps=60, batch=512)
    changed(monkeypatch, SAEBENCH, steps=300, batch=256)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def unrelated(seed: int, count: int = F) -> torch.Tensor:
    return unit(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)))


def sums_of_two(count: int = F) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [count, D], each a sum of 2 of SHARED orthogonal directions with weights from 0.5 to 1, and which ones."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(D, SHARED, generator=generator)).Q.T
    pairs = torch.stack([torch.randperm(SHARED, generator=generator)[:2] for _ in range(count)])
    weights = 0.5 + 0.5 * torch.rand(count, 2, generator=generator)
    return unit((weights[..., None] * directions[pairs]).sum(1)), pairs


def dictionary(rows: torch.Tensor, dead: int = 0) -> SparseAutoencoder:
    """A latent for each decoder row, of which the first `dead` never fire."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=len(rows), activation="relu", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc[:dead] = -100
    return sae


class Planted(Evaluation):
    """Every decoder row is an activation, so that all latents fire whose bias allows it."""

    is_testbed = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(
        self, sae: SparseAutoencoder, random: SparseAutoencoder | None = None, seed: int = 0, protocol: str = OWN
    ):
        super().__init__(cast(Any, SimpleNamespace(model=SimpleNamespace(device="cpu"))), sae, random, seed)
        self.protocol = protocol

    def labelled(self, rows: int) -> TextActivations:
        x = torch.cat([sae.W_dec for sae in (self.sae, *self.controls.values())])
        kept = torch.ones(1, len(x), dtype=torch.bool)
        return TextActivations.of(torch.zeros(1, len(x), dtype=torch.int64), kept, x)


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        changed(patch, steps=60, batch=512)
        return meta_structure(Planted(dictionary(sums_of_two()[0]), dictionary(unrelated(2))))


def test_sums_of_two_shared_directions_score_far_above_rows_that_share_nothing(planted):
    controls = {name: control["meta_explained_variance"] for name, control in planted["controls"].items()}
    assert planted["meta_explained_variance"] > 0.8
    assert list(controls) == ["random", "shuffled"]
    assert all(0.2 < score < planted["meta_explained_variance"] - 0.3 for score in controls.values())
    assert planted["train_explained_variance"] == pytest.approx(planted["meta_explained_variance"], abs=0.05)
    json.dumps(planted, allow_nan=False)


def test_sizes_and_sparsity_are_the_documented_ones(planted):
    held = F // 10
    sizes = {"latents": F, "held_out": held, "meta_latents": (F - held) // RATIO}
    for scores in (planted, *planted["controls"].values()):
        assert {key: scores[key] for key in sizes} == sizes
        assert scores["l0"] <= K + 0.1
    assert all(control["l0"] == pytest.approx(K, abs=0.1) for control in planted["controls"].values())
    assert planted["dead"] == 0
    assert planted["protocol"] == {"k": K, "ratio": RATIO, "steps": 60, "batch": 512}
    assert (K, RATIO, LEAST, FEWEST, SPLIT, STEPS, BATCH) == (4, 21, 8, 32, 1000, 500, 256)  # as documented


def test_the_listed_members_share_a_direction(planted):
    _, pairs = sums_of_two()
    assert len(planted["largest"]) == module.SHOWN
    counts = [meta["count"] for meta in planted["largest"]]
    assert counts == sorted(counts, reverse=True)
    for meta in planted["largest"]:
        assert len(meta["members"]) == len(meta["cosines"]) == module.MEMBERS
        common = torch.bincount(pairs[meta["members"]].flatten(), minlength=SHARED).max()
        assert int(common) >= module.MEMBERS - 1
        assert min(meta["cosines"]) > 0.5


def test_held_out_rows_are_not_trained_on(monkeypatch):
    """Rows of one direction each: the held-out ones are badly explained, the others well."""
    found = meta_structure(Planted(dictionary(unrelated(3))))
    assert found["meta_explained_variance"] < found["train_explained_variance"] - 0.01
    changed(monkeypatch, split=F + 1)
    whole = meta_structure(Planted(dictionary(unrelated(3))))
    assert whole["held_out"] == 0
    assert whole["meta_explained_variance"] == whole["train_explained_variance"]


def test_a_small_dictionary_is_scored_on_its_training_rows():
    count = 60
    found = meta_structure(Planted(dictionary(sums_of_two(count)[0])))
    assert count < SPLIT
    assert (found["held_out"], found["meta_latents"], found["latents"]) == (0, LEAST, count)
    assert found["meta_explained_variance"] > found["controls"]["shuffled"]["meta_explained_variance"] + 0.1


def test_dead_latents_are_left_out_and_counted():
    """Unrelated rows of latents that never fire change nothing, and the members are numbers of the whole dictionary."""
    rows, dead = sums_of_two(200)[0], 100
    alone = meta_structure(Planted(dictionary(rows)))
    beside = meta_structure(Planted(dictionary(torch.cat([unrelated(4, dead), rows]), dead)))
    assert (beside["dead"], beside["latents"]) == (dead, 200)
    for meta in alone["largest"]:
        meta["members"] = [latent + dead for latent in meta["members"]]
    changed = ("dead", "rows")
    assert {k: v for k, v in beside.items() if k not in changed} == {k: v for k, v in alone.items() if k not in changed}


def test_a_random_control_gives_as_many_rows_as_the_dictionary_has_live_latents():
    dead, rows = 100, sums_of_two(200)[0]
    found = meta_structure(Planted(dictionary(rows, dead), dictionary(unrelated(2, 200), 150)))
    assert found["controls"]["random"]["latents"] == found["latents"] == 100


def test_rerunning_gives_the_same_bits_and_another_seed_another_dictionary(planted):
    again = meta_structure(Planted(dictionary(sums_of_two()[0]), dictionary(unrelated(2))))
    assert again == planted
    torch.rand(3)
    rows = dictionary(sums_of_two(100)[0])
    first, other = meta_structure(Planted(rows)), meta_structure(Planted(rows, seed=1))
    assert first["meta_explained_variance"] != other["meta_explained_variance"]


def test_rows_at_their_initial_directions_are_no_structure(monkeypatch):
    """A meta-dictionary that started from the dictionary's own seed would start at its first decoder rows."""
    first_rows = []

    class Started(SparseAutoencoder):
        def __init__(self, config: SAEConfig, *, seed: int = 0):
            super().__init__(config, seed=seed)
            first_rows.append(self.W_dec.detach().clone())

    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=200, activation="relu", k=4), seed=0)
    monkeypatch.setattr(meta_recipes, "SparseAutoencoder", Started)
    changed(monkeypatch, steps=1)
    meta_structure(Planted(sae, seed=0))
    (of_sae, _) = first_rows
    assert float((of_sae @ sae.W_dec.detach().T).max()) < 0.9


def test_too_few_live_latents_have_no_score_but_a_warning():
    found = meta_structure(Planted(dictionary(sums_of_two(40)[0], dead=40 - FEWEST + 1)))
    assert found["meta_explained_variance"] is None
    assert found["largest"] == []
    assert found["dead"] == 40 - FEWEST + 1
    assert found["warnings"][0] == "sae: 31 decoder rows can be used; a meta-dictionary needs at least 32"
    json.dumps(found, allow_nan=False)


def test_shuffled_rows_have_the_same_coordinates_in_another_order():
    rows = sums_of_two(50)[0]
    shuffled = module._shuffled(rows, np.random.default_rng(0))
    assert shuffled.norm(dim=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert float((shuffled - rows).abs().max()) > 0.1
    ratio = shuffled[:, :1] / shuffled[:, 1:2]
    assert not torch.allclose(ratio, rows[:, :1] / rows[:, 1:2])


@torch.no_grad()
def test_scores_follow_their_formulas(monkeypatch):
    """The figures of a meta-dictionary, from its reconstructions in dense float64 products."""
    fits = []
    inner = module._fit
    monkeypatch.setattr(module, "_fit", lambda *given: fits.append((given[0], inner(*given))) or fits[-1][1])
    for protocol in (OWN, SAEBENCH):
        meta_structure(Planted(dictionary(unrelated(3, 200)), protocol=protocol))
        rows, fit = fits[0]
        fits.clear()
        sae = fit.sae
        acts = torch.relu((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).double()
        kept = acts * (acts >= acts.flatten().topk(K * len(rows)).values[-1])
        error = (rows.double() - kept @ sae.W_dec.double() - sae.b_dec).square().sum()
        spread = (rows - rows.mean(0)).double().square().sum()
        figures = fit.figures
        assert figures["meta_explained_variance"] == pytest.approx(1 - float(error / spread), abs=1e-5)
        assert figures["mse"] == pytest.approx(float(error) / (200 * D), rel=1e-4)
        assert figures["l0"] == pytest.approx(K)


def test_a_threshold_that_is_already_there_is_not_used(monkeypatch):
    """Held-out rows are scored with 4 meta-latents each, however many the training's threshold would keep."""
    changed(monkeypatch, train=lambda *given: _with_threshold(meta_recipes.own_trained(*given), 0.0))
    found = meta_structure(Planted(dictionary(unrelated(3))))
    assert found["held_out"] == F // 10
    assert found["l0"] == pytest.approx(K, abs=0.1)


def _with_threshold(sae: SparseAutoencoder, value: float) -> SparseAutoencoder:
    with torch.no_grad():
        sae.threshold.fill_(value)
    return sae


def test_saebench_s_recipe_uses_all_rows_and_a_quarter_as_many_meta_latents():
    rows, dead = sums_of_two(102)[0], 50
    found = meta_structure(Planted(dictionary(rows, dead), dictionary(unrelated(2, 102), 90), protocol=SAEBENCH))
    sizes = {"latents": 102, "held_out": 0, "meta_latents": 26}
    for scores in (found, *found["controls"].values()):
        assert {key: scores[key] for key in sizes} == sizes
        assert scores["l0"] == pytest.approx(K)
        assert scores["meta_explained_variance"] == scores["train_explained_variance"]
    assert (found["dead"], found["rows"], found["protocol_name"]) == (0, 0, "saebench")
    assert found["meta_explained_variance"] > found["controls"]["shuffled"]["meta_explained_variance"] + 0.1
    assert found["training"]["seconds"] > 0
    assert RECIPES[SAEBENCH].width(3) == K
    json.dumps(found, allow_nan=False)


def test_rerunning_saebench_s_recipe_gives_the_same_bits():
    def figures() -> dict[str, Any]:
        found = meta_structure(Planted(dictionary(sums_of_two(100)[0]), protocol=SAEBENCH))
        return {name: value for name, value in found.items() if name != "training"}

    first = figures()
    torch.rand(3)
    assert figures() == first


def test_every_pass_has_all_rows_in_another_order():
    rows = torch.arange(12.0)[:, None]
    batches = meta_recipes._batches(rows, 4, np.random.default_rng(0))
    first, second = (torch.cat([next(batches).x for _ in range(3)]).flatten().tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == rows.flatten().tolist()
    assert first != second
    assert first != sorted(first)


def test_a_result_depends_on_its_protocol():
    others = (Sizes(), {})
    inputs = [_inputs("meta_structure", EvalOptions(protocol=name), *others) for name in (OWN, SAEBENCH)]
    assert [given.get("protocol") for given in inputs] == [None, SAEBENCH]


def test_rows_without_variance_have_no_score():
    found = meta_structure(Planted(dictionary(unrelated(1, 1).expand(40, D)), protocol=SAEBENCH))
    assert found["meta_explained_variance"] is None
    assert found["mse"] < 1e-3


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="^protocol: lens is not allowed; it must be temposae or saebench$"):
        meta_structure(Planted(dictionary(unrelated(1, 40)), protocol="lens"))


def test_figures_do_not_depend_on_how_many_rows_the_model_reads_at_once(testbed):
    """With the embedded model's activations: the same latents fire, so the same rows are trained on."""
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=48, activation="relu", k=6), seed=3)
    with torch.no_grad():
        sae.b_enc[:5] = -1e6
    found = []
    for rows in (4, 9):
        stream = ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=rows), model=testbed, seed=0)
        found.append(meta_structure(Evaluation(stream, sae, sae, share=64, neurons=False)))
    assert found[0] == found[1]
    assert found[0]["dead"] == 5
