"""Description lengths by SAEBench's protocol, beside SAEBench 0.6.0's own functions on the same activations.

Its sums are float32 and ours float64, so lengths and errors differ by rounding: 1e-5 of their size.
"""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from temposae.evals import evaluation as shared
from temposae.evals import saebench_mdl
from temposae.evals.evaluation import Evaluation, Neurons, TextActivations
from temposae.evals.mdl import mdl
from temposae.evals.report_tables import section
from temposae.evals.saebench import ForSAEBench
from temposae.evals.saebench_mdl import K_VALUES, NUM_BINS, figures, pick
from temposae.reporting.markdown import number

from .test_saebench_runners import dictionary

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted")  # SAEBench's


class TopK(torch.nn.Module):
    """SAELens': the k largest values of each row, through a ReLU, and zeros."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, indices = x.topk(self.k, dim=-1)
        return torch.zeros_like(x).scatter(-1, indices, values.relu())


@pytest.fixture(scope="module")
def theirs(saebench) -> Any:
    """SAEBench's module, which imports more names than it needs here and calls `.cuda()`."""
    stand_ins = {
        "collectibles": {"ListCollection": type("ListCollection", (), {"__class_getitem__": lambda cls, _: cls})},
        "loguru": {"logger": SimpleNamespace(debug=lambda *_: None)},
        "sae_lens.saes.topk_sae": {"TopK": TopK},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in stand_ins.items():
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        vars(sys.modules["sae_lens"]).setdefault("ActivationsStore", object)
        found = importlib.import_module("sae_bench.evals.mdl.main")
        patch.setattr(found, "config", SimpleNamespace(sae_batch_size=1), raising=False)
        patch.setattr(found, "tqdm", lambda steps, **_: steps)
        yield found


class AsSAE:
    """An autoencoder with SAEBench's dense `encode` and `decode`."""

    def __init__(self, autoencoder: Any, d: int):
        self.autoencoder, self.cfg = autoencoder, SimpleNamespace(d_in=d)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.encode_sparse(x[:, 0], torch.zeros(len(x), dtype=torch.long)).to_dense()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.autoencoder.W_dec


def measured(theirs, sae: Any, x: torch.Tensor, threshold: float) -> list[dict[str, Any]]:
    """What SAEBench's functions find for every number of bins and k."""
    f = sae.encode(x[:, None]).reshape(len(x), -1)
    largest = torch.cat([f, torch.full((1, f.shape[1]), 100.0)]).amax(0)
    store, found = SimpleNamespace(get_filtered_llm_batch=lambda: x), []
    for num_bins in NUM_BINS:
        bins = theirs.build_bins(torch.zeros_like(largest), largest, num_bins=num_bins)
        for k in K_VALUES:
            within, loss = theirs.check_quantised_features_reach_mse_threshold(bins, store, sae, threshold, sae, k)
            length = theirs.calculate_dl(f.shape[1], bins, "cpu", store, sae, k)
            found.append({"num_bins": num_bins, "k": k, "description_length": length, "mse_loss": loss})
            found[-1]["within_threshold"] = within
    return found


def texts(stream_of, by: float) -> TextActivations:
    """Activations of 24 documents, scaled so that many exceed the first bin and some exceed 100."""
    collected = Evaluation(stream_of(), dictionary(), None).labelled(24)
    collected.x.mul_(by)
    return collected


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("by", [1.0, 30.0])
def test_every_setting_is_theirs(theirs, stream_of, monkeypatch, activation, by):
    monkeypatch.setattr(shared, "CHUNK", 500)  # several chunks, the last one shorter
    sae, collected = dictionary(activation=activation), texts(stream_of, by)
    evaluation = Evaluation(stream_of(), sae, None)
    f = evaluation.sae.encode(collected.x)
    assert (f.max() > 100) == (by > 1)
    assert ((f > 0).sum(1) > 16).any() == (activation == "relu")  # k leaves something out
    adapter = ForSAEBench(sae, evaluation.stream.config)
    losses = sorted(setting["mse_loss"] for setting in figures(evaluation.sae, collected)["settings"])
    threshold = (losses[0] + losses[-1]) / 2
    monkeypatch.setattr(saebench_mdl, "THRESHOLD", threshold)
    ours, expected = figures(evaluation.sae, collected), measured(theirs, adapter, collected.x, threshold)
    agree(ours["settings"], expected)
    assert {setting["within_threshold"] for setting in expected} == {True, False}
    by_k = [{round(setting["mse_loss"], 6) for setting in expected if setting["num_bins"] == n} for n in NUM_BINS]
    assert (max(map(len, by_k)) == len(K_VALUES)) == (activation == "relu")  # errors depend on k
    viable = [setting for setting in expected if setting["within_threshold"]]
    shortest = min(setting["description_length"] for setting in viable)
    assert ours["bits_per_token"] == pytest.approx(shortest, rel=1e-5)
    assert ours["mse_loss"] < threshold
    assert ours["active_bits"] + ours["value_bits"] == pytest.approx(ours["bits_per_token"])


def test_signed_activations_are_treated_as_theirs(theirs, stream_of):
    """`lm_neurons`: their functions count negative activations as inactive, and leave them out of the histogram."""
    collected, neurons = texts(stream_of, 60.0), Neurons(128, 40)
    ours = figures(neurons, collected)["settings"]
    assert (collected.x < 0).any()
    agree(ours, measured(theirs, AsSAE(neurons, 128), collected.x, saebench_mdl.THRESHOLD))


def test_rounded_activations_are_theirs(theirs):
    """Middles of bins, of zeros too, from 0 to the largest activation above 100."""
    f = torch.rand(300, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([10, 90, 99, 150, 400])
    f[f < 40] = 0
    largest = f.amax(0).clamp_min(100)
    for num_bins in NUM_BINS:
        bins = theirs.build_bins(torch.zeros(5), largest, num_bins=num_bins)
        width = largest / num_bins
        ours = ((f / width).floor().clamp_max(num_bins - 1) + 0.5) * width
        torch.testing.assert_close(theirs.quantize_features_to_bin_midpoints(f, bins), ours)


def agree(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(ours) == len(expected) == len(NUM_BINS) * len(K_VALUES)
    for found, setting in zip(ours, expected, strict=True):
        assert found.keys() == setting.keys()
        for key, value in setting.items():
            assert found[key] == pytest.approx(value, rel=1e-5), (setting, key)


@pytest.mark.parametrize("within", [(False,) * 4, (True,) * 4])
def test_the_chosen_setting_is_theirs(theirs, within):
    settings = made(within)

    class Results(list):
        description_length = [setting["description_length"] for setting in settings]
        within_threshold = [setting["within_threshold"] for setting in settings]

    expected = theirs.MDLEvalResultsCollection.pick_minimum_viable(Results(settings))
    assert pick(settings) is expected is settings[0]


@pytest.mark.parametrize(("within", "chosen"), [((False, True, True, True), 2), ((False, True, False, False), 1)])
def test_the_shortest_within_the_threshold_is_chosen(within, chosen):
    """SAEBench's function takes its place among those within the threshold for its place among all."""
    assert pick(settings := made(within)) is settings[chosen]


def made(within: tuple[bool, ...]) -> list[dict[str, Any]]:
    lengths = (1.0, 3.0, 2.0, 2.0)
    return [{"description_length": n, "within_threshold": viable} for n, viable in zip(lengths, within, strict=True)]


def test_the_eval_has_the_figures_of_the_protocol(stream_of):
    sae, random = dictionary(), dictionary(activation="topk")
    evaluation = Evaluation(stream_of(), sae, random)
    own = mdl(evaluation, rows=24)
    evaluation.protocol = "saebench"
    result = mdl(evaluation, rows=24)
    json.dumps(result, allow_nan=False)
    assert (own["protocol_name"], result["protocol_name"]) == ("temposae", "saebench")
    assert own.keys() - result.keys() == {"uniform_bits", "width", "bins", "at_fvu_of"}
    collected = evaluation.labelled(24)
    for name, autoencoder in evaluation.autoencoders(collected, mean=False).items():
        scores = result if name == "sae" else result["controls"][name]
        beside = own if name == "sae" else own["controls"][name]
        assert (scores["fvu"], scores["l0"]) == (beside["fvu"], beside["l0"])
        expected = figures(autoencoder, collected)
        assert {key: scores[key] for key in expected} == expected
        spread = float((collected.x.double() - collected.x.double().mean(0)).square().sum())
        mse = (scores["mse_loss"] * 128) ** 2
        assert scores["fvu_rounded"] == pytest.approx(mse * collected.x.numel() / spread, rel=1e-5)
        assert scores["bits_per_dimension"] == scores["bits_per_token"] / 128
    low, high = (result["intervals"]["fvu"][edge] for edge in ("low", "high"))
    assert low < result["fvu"] < high
    assert result["intervals"].keys() == {"fvu"}
    assert result["protocol"] == {
        "num_bins_values": [4, 6, 8, 12, 16, 32], "k_values": [16, 24, 32], "mse_epsilon_threshold": 0.01,
        "least_maximum": 100,
    }  # fmt: skip
    markdown = "\n".join(section("mdl", json.loads(json.dumps(result))))
    for start in range(0, len(result["settings"]), len(K_VALUES)):
        settings = result["settings"][start : start + len(K_VALUES)]
        bins, length = settings[0]["num_bins"], settings[0]["description_length"]
        line = " | ".join(["dictionary", *map(number, (bins, length, *(setting["mse_loss"] for setting in settings)))])
        assert f"| {line} |" in markdown


@pytest.mark.parametrize("protocol", ["temposae", "saebench"])
def test_figures_do_not_depend_on_batch_size(stream_of, protocol):
    results = []
    for rows_per_forward in (16, 5):
        evaluation = Evaluation(
            stream_of(rows_per_forward=rows_per_forward), dictionary(), dictionary(activation="topk")
        )
        evaluation.protocol = protocol
        results.append(numbers(mdl(evaluation, rows=24)))
    assert results[0] == pytest.approx(results[1], rel=1e-9, abs=1e-9)


def numbers(value: Any, place: str = "") -> dict[str, float]:
    """Every number of a result by its place, without times."""
    if isinstance(value, (dict, list)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in parts for key, leaf in numbers(part, f"{place}/{name}").items()}
    return {place: value} if isinstance(value, (int, float)) and not place.endswith("/seconds") else {}
