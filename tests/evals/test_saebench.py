"""Results in SAEBench's format, against SAEBench's own types."""

import json
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.core import core
from temposae.evals.saebench import file_name, output


def check(cls: type, result: dict[str, Any]) -> Any:
    """The result as SAEBench's type; nothing that it has no field for is in it, since that would be dropped silently."""
    found = TypeAdapter(cls).validate_python(result)
    unknown(found, result, "")
    return found


def unknown(found: Any, given: Any, place: str) -> None:
    if is_dataclass(found):
        names = {field.name for field in fields(found)}
        assert set(given) <= names, f"{place}: {set(given) - names}"
        for name, value in given.items():
            unknown(getattr(found, name), value, f"{place}.{name}")
    elif isinstance(found, list):
        for nth, (one, other) in enumerate(zip(found, given, strict=True)):
            unknown(one, other, f"{place}[{nth}]")


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=128, d_sae=48, k=4), seed=1)


def test_core_is_what_saebench_reads(stream_of, sae):
    types = pytest.importorskip("sae_bench.evals.core.eval_output", reason="pip install --no-deps sae-bench")
    stream = stream_of()
    result = core(stream, sae, {"random": sae}, rows=12, ce_rows=6)
    found = output("core", result, sae, stream.config, sae_id="run")
    json.dumps(found, allow_nan=False)
    read = check(types.CoreEvalOutput, found).eval_result_metrics
    assert read.model_performance_preservation.ce_loss_score == result["saebench"]["ce_loss_score"]
    assert read.reconstruction_quality.explained_variance == result["saebench"]["explained_variance"]
    assert read.sparsity.l0 == pytest.approx(4, abs=0.5)
    assert 0 < read.misc_metrics.frac_alive <= 1
    found["eval_result_metrics"]["sparsity"]["l2"] = 1.0
    with pytest.raises(AssertionError, match="eval_result_metrics.sparsity: {'l2'}"):
        check(types.CoreEvalOutput, found)


def test_figures_of_the_weights_are_right(stream_of, sae):
    stream = stream_of()
    result = core(stream, sae, {}, rows=6, ce_rows=3)
    found = output("core", result, sae, stream.config, sae_id="run")
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).fill_diagonal_(-1)
    for index in (0, 17, 47):
        detail = found["eval_result_details"][index]
        assert detail["max_decoder_cosine_sim"] == pytest.approx(float(cosine[index].max()), abs=1e-5)
        assert detail["encoder_decoder_cosine_sim"] == pytest.approx(1, abs=1e-5)  # before training
        assert detail["encoder_norm"] == pytest.approx(1, abs=1e-5)
    rows = next(stream.text.held_out(6, 6))
    kept = stream.read(rows)[1]
    f = torch.zeros(6, 128, 48)
    f[kept] = sae.encode(stream.model.activations(rows.tokens)[kept])
    active = (f > 0).sum(1)
    for index in (0, 17, 47):
        detail = found["eval_result_details"][index]
        assert detail["feature_density"] == pytest.approx(float(active[:, index].sum()) / int(kept.sum()), abs=1e-6)
        of_rows = float(active[:, index].sum()) / max(1, int((active[:, index] > 0).sum()))
        assert detail["consistent_activation_heuristic"] == pytest.approx(of_rows, rel=1e-3)


def test_names_and_what_saebench_does_not_have(sae):
    assert file_name("google/gemma-2-2b", "blocks.1/x") == "google_gemma-2-2b_blocks.1_x_eval_results.json"
    nothing = {"letters": {}, "settings": RESULTS["absorption"]["settings"]}
    for name, result in (("clusters", {}), ("core", {"skipped": "why"}), ("absorption", nothing)):
        assert output(name, result, sae, StreamConfig(), sae_id="run") is None


TOPS = {f"top_{k}": 0.9 for k in (1, 2, 5, 10, 20, 50)}
RESULTS = {
    "sparse_probing": {
        **TOPS, "test_accuracy": 0.95, "top_1_error": 0.01, "llm": TOPS | {"test_accuracy": 0.99},
        "sets": {"topic": {**TOPS, "test_accuracy": None, "llm": TOPS | {"test_accuracy": 0.99}, "controls": {}}},
    },
    "unlearning": {
        "score": 0.4, "retained": 0.995,
        "settings": [{"retain_threshold": t, "latents": 10, "multiplier": 25} for t in (0.01, 0.001)],
    },
    "scr": {
        "scr_metric": {"2": 0.1, "20": 0.3}, "scr_dir1": {"2": None, "20": None}, "scr_dir2": {"2": 0.1, "20": 0.3},
        "sets": {"sailing/cooking": {"clean_topic": 1.0, "scr_metric": {"2": 0.1, "20": None}}},
    },
    "absorption": {
        "settings": {"min_GT_probe_f1": 0.6, "f1_jump_threshold": 0.03, "max_k_value": 10},
        "letters": {
            letter: {
                "probe_f1": f1, "main": [3, 4], "known": 40, "absorbed": 4, "absorption": share, "absorption_fraction": 0.2,
            }
            for letter, f1, share in (("a", 0.9, 0.1), ("b", 0.8, 0.3), ("c", 0.5, 0.9))
        },
    },
    "tpp": {"tpp": {"2": {"total_metric": 0.2, "intended_diff_only": 0.3, "unintended_diff_only": 0.1}}},
}  # fmt: skip
TYPES = {
    "sparse_probing": ("sparse_probing.eval_output", "SparseProbingEvalOutput"),
    "unlearning": ("unlearning.eval_output", "UnlearningEvalOutput"),
    "scr": ("scr_and_tpp.eval_output", "ScrEvalOutput"),
    "tpp": ("scr_and_tpp.eval_output", "TppEvalOutput"),
    "absorption": ("absorption.eval_output", "AbsorptionEvalOutput"),
}
WHERE = {
    "sparse_probing": ("sae.sae_top_5_test_accuracy", 0.9),
    "unlearning": ("unlearning.unlearning_score", 0.4),
    "scr": ("scr_metrics.scr_metric_threshold_20", 0.3),
    "tpp": ("tpp_metrics.tpp_threshold_2_total_metric", 0.2),
    "absorption": ("mean.mean_full_absorption_score", 0.2),  # "c" is not told by the model
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_others_are_what_saebench_reads(sae, name):
    module, cls = TYPES[name]
    types = pytest.importorskip(f"sae_bench.evals.{module}", reason="pip install --no-deps sae-bench")
    given = RESULTS[name] | {"controls": {"random": {}}, "seconds": 1.0}
    found = output(name, given, sae, StreamConfig(hook="blocks.1.hook_resid_post"), sae_id="run", seed=3)
    json.dumps(found, allow_nan=False)
    read = check(getattr(types, cls), found)
    assert read.eval_type_id == type(read).eval_type_id
    assert read.eval_config.random_seed == 3
    value: Any = read.eval_result_metrics
    where, expected = WHERE[name]
    for part in where.split("."):
        value = getattr(value, part)
    assert value == pytest.approx(expected)
