"""Results in SAEBench's format, against SAEBench's own types."""

import copy
import importlib.util
import json
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.core import core
from temposae.evals.evaluation import Evaluation
from temposae.evals.saebench import MAKERS, architecture, file_name, output
from temposae.evals.scr_tpp import scr, tpp
from temposae.evals.sparse_probing import sparse_probing

DEAD = 5
ABOUT = {"llm_dtype": "float32", "training_tokens": None}


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
    stream = stream_of(rows_per_forward=4)
    result = core(stream, sae, {"random": sae}, rows=40, ce_rows=20)
    found = output("core", result, sae, stream.config, sae_id="run", **ABOUT)
    json.dumps(found, allow_nan=False)
    read = check(types.CoreEvalOutput, found).eval_result_metrics
    assert read.model_performance_preservation.ce_loss_score == result["saebench"]["ce_loss_score"]
    assert read.reconstruction_quality.explained_variance == result["saebench"]["explained_variance"]
    assert read.reconstruction_quality.mse == result["saebench"]["mse"]
    assert found["eval_result_unstructured"]["temposae"]["mse"] == result["mse"]
    assert found["eval_config"] == {
        "model_name": "testbed", "llm_dtype": "float32", "batch_size_prompts": 16, "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 3, "dataset": "the embedded language of testbed", "context_size": 128,
        "compute_kl": True, "compute_ce_loss": True, "compute_l2_norms": True, "compute_sparsity_metrics": True,
        "compute_variance_metrics": True, "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True, "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }  # fmt: skip
    assert read.sparsity.l0 == pytest.approx(4, abs=0.5)
    assert 0 < read.misc_metrics.frac_alive <= 1
    found["eval_result_metrics"]["sparsity"]["l2"] = 1.0
    with pytest.raises(AssertionError, match="eval_result_metrics.sparsity: {'l2'}"):
        check(types.CoreEvalOutput, found)


def test_figures_of_the_weights_are_right(stream_of, sae):
    stream, sae = stream_of(), copy.deepcopy(sae)
    with torch.no_grad():
        sae.b_enc[DEAD] = -1e6
    result = core(stream, sae, {}, rows=6, ce_rows=3)
    found = output("core", result, sae, stream.config, sae_id="run", **ABOUT)
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
    assert not active[:, DEAD].any()
    for index in (0, 17, 47, DEAD):
        detail = found["eval_result_details"][index]
        assert detail["feature_density"] == pytest.approx(float(active[:, index].sum()) / int(kept.sum()), abs=1e-6)
        row_label = float(active[:, index].sum()) / max(1, int((active[:, index] > 0).sum()))
        assert detail["consistent_activation_heuristic"] == pytest.approx(row_label or -1, rel=1e-3)


def test_names_and_what_saebench_does_not_have(sae):
    assert file_name("google/gemma-2-2b", "blocks.1/x") == "google_gemma-2-2b_blocks.1_x_eval_results.json"
    nothing = {"letters": {}, "protocol": ABSORPTION}
    for name, result in (("clusters", {}), ("core", {"skipped": "why"}), ("absorption", nothing)):
        assert output(name, result, sae, StreamConfig(), sae_id="run", **ABOUT) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"activation": "relu"}, "standard"),
        ({"activation": "topk"}, "topk"),
        ({"activation": "batchtopk"}, "batch_topk"),
        ({"activation": "jumprelu"}, "jumprelu"),
        ({"activation": "batchtopk", "prefixes": (4, 16)}, "matryoshka_batch_topk"),
        ({"activation": "topk", "mask": MaskConfig(kind="ranges", positions=8)}, "topk_ranges_mask"),
        ({"activation": "topk", "parts": ({"kind": "feature_dropout"},)}, "topk_feature_dropout"),
    ],
)
def test_architectures_have_saebench_s_names(settings, expected):
    assert architecture(SAEConfig(d_in=8, d_sae=16, k=2, **settings)) == expected
    pytest.importorskip("sae_bench", reason="pip install --no-deps sae-bench")
    plain = not {"mask", "parts"} & set(settings)
    graphs = (
        Path(importlib.util.find_spec("sae_bench").submodule_search_locations[0]) / "sae_bench_utils/graphing_utils.py"
    )
    assert plain == (f'"{expected}": ' in graphs.read_text())


TOPS = {f"top_{k}": 0.9 for k in (1, 2, 5, 10, 20, 50)}
FULL = {"test_accuracy": 0.99, "best_epoch_accuracy": 0.995}
LETTER = {"main": [3, 4], "known": 40, "absorbed": 4, "absorption_fraction": 0.2}
ABSORPTION = {
    "min_GT_probe_f1": 0.6, "min_feats_for_eval": 20, "f1_jump_threshold": 0.03, "max_k_value": 10,
    "k_sparse_probe_l1_decay": 0.01, "k_sparse_probe_batch_size": 4096, "k_sparse_probe_num_epochs": 50,
    "eval_k_sparse_probe_batch_size": 321, "precalc_k_sparse_probe_sae_acts": True,
    "prompt_template": "{word} has the first letter:", "prompt_token_pos": -7,
}  # fmt: skip
TOLD = {letter: LETTER | {"probe_f1": 0.9, "absorption": 0.1} for letter in "abcdefghijklmnopqrs"}
PROBED = {
    "early_stopping_patience": 20, "probe_epochs": 20, "probe_lr": 1e-3, "probe_l1_penalty": 1e-3,
    "probe_train_batch_size": 16, "probe_test_batch_size": 500,
}  # fmt: skip
META = {
    "width_ratio": 0.25, "k": 4, "train_steps": 1500, "train_batch_size": 1024, "learning_rate": 5e-4,
    "weight_decay": 0.0, "autocast": False, "eval_batch_size": 4096, "dead_feature_window": 2000,
    "feature_sampling_window": 200, "dtype": "float32",
}  # fmt: skip
TPP_AT_2 = {"total_metric": 0.2, "intended_diff_only": 0.3, "unintended_diff_only": 0.1}
RESULTS = {
    "sparse_probing": {
        **TOPS, "test_accuracy": 0.95, "best_epoch_accuracy": 0.96, "top_1_error": 0.01, "llm": TOPS | FULL,
        "sets": {
            "topic": {
                **TOPS, **dict.fromkeys(FULL), "llm": TOPS | FULL, "controls": {},
                "classes": {"sailing": {"top_1": 0.9, "train_rows": 61, "test_rows": 60}},
            }
        },
        "protocol": {
            "dataset_names": ["topic"], "probe_train_set_size": 61, "probe_test_set_size": 60, "context_length": 64,
            "k_values": [1, 2, 5, 10, 20, 50],
        },
    },
    "unlearning": {
        "score": 0.4, "retained": 0.995, "texts": {"from": "it"},
        "settings": [{"retain_threshold": t, "latents": 10, "multiplier": 25.0} for t in (0.01, 0.001)],
        "protocol": {
            "dataset_names": ["forget.jsonl", "retain.jsonl"], "dataset_size": 100, "seq_len": 512,
            "target_metric": "correct", "llm_batch_size": 4,
        },
    },
    "scr": {
        "scr_metric": {"2": 0.1, "20": 0.3}, "scr_dir1": {"2": None, "20": None}, "scr_dir2": {"2": 0.1, "20": 0.3},
        "spread": {"2": 0.1, "20": None}, "seeds": 3, "protocol_name": "saebench",
        "sets": {
            "bios: nurse/poet": {
                "of": "bios", "pair": ["nurse", "poet"], "clean_class": 1.0, "scr_metric": {"2": 0.1, "20": None},
                "scr_dir1": {"2": 0.1, "20": 0.2}, "scr_dir2": {"2": 0.0, "20": 0.0},
            }
        },
        "protocol": {
            **PROBED, "dataset_names": ["bios"], "train_set_size": 70, "test_set_size": 68, "context_length": 128,
            "n_values": [2, 20], "column1_vals_lookup": {"bios": [["nurse", "poet"]]},
        },
    },
    "tpp": {
        "tpp": {"2": TPP_AT_2},
        "spread": {"2": 0.01}, "clean_accuracy": 0.99, "seeds": 3, "protocol_name": "saebench",
        "sets": {"bios": {"classes": ["nurse", "poet"], "tpp": {"2": TPP_AT_2}}},
        "protocol": {
            **PROBED, "dataset_names": ["bios"], "train_set_size": 128, "test_set_size": 120, "context_length": 128,
            "n_values": [2], "column1_vals_lookup": {},
        },
    },
    "absorption": {
        "mean_main_f1": 0.8, "protocol": ABSORPTION,
        "letters": TOLD
        | {"t": LETTER | {"probe_f1": 0.8, "absorption": 0.3}, "u": LETTER | {"probe_f1": 0.5, "absorption": 0.9}},
    },
    "meta_structure": {
        "meta_explained_variance": 0.4, "mse": 0.002, "l0": 4.0, "latents": 64, "meta_latents": 16,
        "training": {"seconds": 7.5}, "protocol_name": "saebench", "protocol": META,
    },
}  # fmt: skip
TYPES = {
    "sparse_probing": ("sparse_probing.eval_output", "SparseProbingEvalOutput"),
    "unlearning": ("unlearning.eval_output", "UnlearningEvalOutput"),
    "scr": ("scr_and_tpp.eval_output", "ScrEvalOutput"),
    "tpp": ("scr_and_tpp.eval_output", "TppEvalOutput"),
    "absorption": ("absorption.eval_output", "AbsorptionEvalOutput"),
    "meta_structure": ("meta_structure.eval_output", "MetaStructureEvalOutput"),
}
WHERE = {
    "sparse_probing": {
        "sae.sae_top_5_test_accuracy": 0.9, "sae.sae_test_accuracy": 0.96, "llm.llm_test_accuracy": 0.995,
        "llm.llm_top_100_test_accuracy": None,
    },
    "unlearning": {"unlearning.unlearning_score": 0.4},
    "scr": {"scr_metrics.scr_metric_threshold_20": 0.3, "scr_metrics.scr_dir1_threshold_2": None},
    "tpp": {"tpp_metrics.tpp_threshold_2_total_metric": 0.2, "tpp_metrics.tpp_threshold_5_total_metric": None},
    "absorption": {"mean.mean_full_absorption_score": 0.11},  # "u" is not told by the model
    "meta_structure": {
        "meta_structure.decoder_fraction_variance_explained": 0.4, "meta_structure.final_reconstruction_mse": 0.002,
        "meta_structure.train_time_seconds": 7.5,
    },
}  # fmt: skip
MODEL = {"model_name": "smollm2", "llm_dtype": "bfloat16", "random_seed": 3}
SIZES = {"llm_batch_size": 9, "lower_vram_usage": False}
PROBES = {"scr": {"train_set_size": 70, "test_set_size": 68}, "tpp": {"train_set_size": 128, "test_set_size": 120}}
USED = {
    "sparse_probing": {
        **SIZES, "dataset_names": ["topic"], "probe_train_set_size": 61, "probe_test_set_size": 60, "context_length": 64,
        "sae_batch_size": 64, "k_values": [1, 2, 5, 10, 20, 50],
    },
    "unlearning": {
        "llm_batch_size": 4, "dataset_names": ["forget.jsonl", "retain.jsonl"], "dataset_size": 100, "seq_len": 512,
        "intervention_method": "clamp_feature_activation", "retain_thresholds": [0.001, 0.01], "n_features_list": [10],
        "multipliers": [25], "n_batch_loss_added": 0, "target_metric": "correct", "save_metrics": True,
    },
    "scr": {
        **SIZES, **PROBED, **PROBES["scr"], "perform_scr": True, "dataset_names": ["bios"],
        "context_length": 128, "sae_batch_size": 32, "n_values": [2, 20],
        "column1_vals_lookup": {"bios": [("nurse", "poet")]},
    },
    "tpp": {
        **SIZES, **PROBED, **PROBES["tpp"], "perform_scr": False, "dataset_names": ["bios"],
        "context_length": 128, "sae_batch_size": 32, "n_values": [2], "column1_vals_lookup": {},
    },
    "absorption": {"llm_batch_size": 9, **ABSORPTION},
    "meta_structure": META,
}  # fmt: skip


CONFIGS = {
    "core": ("core.eval_config", "CoreEvalConfig"),
    "sparse_probing": ("sparse_probing.eval_config", "SparseProbingEvalConfig"),
    "unlearning": ("unlearning.eval_config", "UnlearningEvalConfig"),
    "scr": ("scr_and_tpp.eval_config", "ScrAndTppEvalConfig"),
    "tpp": ("scr_and_tpp.eval_config", "ScrAndTppEvalConfig"),
    "absorption": ("absorption.eval_config", "AbsorptionEvalConfig"),
    "meta_structure": ("meta_structure.eval_config", "MetaStructureEvalConfig"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_setting_of_saebench_is_left_to_its_default(stream_of, sae, name):
    """A file says every setting."""
    module, cls = CONFIGS[name]
    types = pytest.importorskip(f"sae_bench.evals.{module}", reason="pip install --no-deps sae-bench")
    stream = stream_of(rows_per_forward=4)
    result = core(stream, sae, {}, rows=8, ce_rows=4) if name == "core" else RESULTS[name]
    found = output(name, result, sae, stream.config, sae_id="run", **ABOUT)
    assert found is not None
    assert found["eval_config"].keys() == {field.name for field in fields(getattr(types, cls))}


@pytest.mark.parametrize("name", RESULTS)
def test_the_others_are_what_saebench_reads(sae, name):
    module, cls = TYPES[name]
    types = pytest.importorskip(f"sae_bench.evals.{module}", reason="pip install --no-deps sae-bench")
    given = RESULTS[name] | {"controls": {"random": {}}, "seconds": 1.0}
    stream = StreamConfig(model="smollm2", hook="blocks.1.hook_resid_post", rows_per_forward=9)
    about = {"llm_dtype": "bfloat16", "training_tokens": 12_000}
    found = output(name, given, sae, stream, sae_id="run", seed=3, **about)
    assert found is not None
    json.dumps(found, allow_nan=False)
    read = check(getattr(types, cls), found)
    assert read.eval_type_id == type(read).eval_type_id
    model = {"random_seed": 3} if name == "meta_structure" else MODEL  # it reads no text
    assert asdict(read.eval_config) == model | USED[name]
    assert found["sae_cfg_dict"]["training_tokens"] == 12_000
    assert found["sae_cfg_dict"]["architecture"] == "topk"
    for where, expected in WHERE[name].items():
        value: Any = read.eval_result_metrics
        for part in where.split("."):
            value = getattr(value, part)
        assert value == (None if expected is None else pytest.approx(expected))


def test_figures_worked_out_in_another_way_stand_under_our_own_names(sae):
    own = {
        name: output(name, RESULTS[name], sae, StreamConfig(), sae_id="run", **ABOUT)["eval_result_unstructured"][
            "temposae"
        ]
        for name in RESULTS
    }
    assert (own["tpp"]["seeds"], own["scr"]["spread"]["2"]) == (3, 0.1)
    assert own["sparse_probing"]["full_width_probe"]["mean over sets"]["sae_test_accuracy"] == 0.95
    assert "logistic" in own["absorption"]["about"]


@pytest.mark.parametrize(("name", "detail"), [("tpp", "bios_tpp_results"), ("scr", "bios_scr_nurse_poet_results")])
def test_ablations_are_written_from_saebench_s_protocol_only(sae, name, detail):
    def written(protocol: str) -> dict[str, Any] | None:
        result = RESULTS[name] | {"protocol_name": protocol}
        return output(name, result, sae, StreamConfig(), sae_id="run", **ABOUT)

    assert written("temposae") is None
    details = written("saebench")["eval_result_details"]
    assert [of_set["dataset_name"] for of_set in details] == [detail]
    key = {"tpp": "tpp_threshold_2_total_metric", "scr": "scr_dir1_threshold_20"}[name]
    assert details[0][key] == 0.2


def test_meta_structure_is_written_from_saebench_s_protocol_only(sae):
    def written(**changes: Any) -> bool:
        result = RESULTS["meta_structure"] | changes
        return output("meta_structure", result, sae, StreamConfig(), sae_id="run", **ABOUT) is not None

    assert written()
    assert not written(protocol_name="temposae")
    assert not written(meta_explained_variance=None)


def test_absorption_on_too_few_letters_or_without_prompts_is_not_written(sae):
    def written(**changes: Any) -> bool:
        result = RESULTS["absorption"] | changes
        return output("absorption", result, sae, StreamConfig(), sae_id="run", **ABOUT) is not None

    assert written()
    assert not written(letters=TOLD)  # 19
    assert not written(protocol=ABSORPTION | {"prompt_template": None, "prompt_token_pos": None})


def test_what_saebench_has_no_form_for_is_not_written(stream_of):
    coder = SparseAutoencoder(SAEConfig(d_in=128, d_sae=16, k=4, d_out=128))
    assert output("tpp", RESULTS["tpp"], coder, StreamConfig(), sae_id="run", **ABOUT) is None
    setting = {"retain_threshold": 0.01, "latents": 10, "multiplier": 2.5}
    own = SparseAutoencoder(SAEConfig(d_in=128, d_sae=16, k=4))
    result = RESULTS["unlearning"] | {"settings": [setting]}
    assert output("unlearning", result, own, StreamConfig(), sae_id="run", **ABOUT) is None


def test_settings_are_those_that_evals_used(stream_of, sae):
    """Of real runs: sizes as counted in what was probed."""
    stream = stream_of()
    evaluation = Evaluation(stream, sae, None, share=4, neurons=False)
    evaluation.protocol = "saebench"
    topics = evaluation.labelled(1024).row_label("topic")
    size = int(topics.bincount().max())
    tones = evaluation.labelled(1024).row_label("tone")

    def even_rows(topic: int) -> int:
        cells = [-(-int(((topics == t) & (tones == tone)).sum()) // 2) for t in (topic, topic + 1) for tone in (0, 1)]
        return min(*cells, cells[0] // 2, cells[3] // 2)

    on_topics = partial(sparse_probing, sets=["topic"])
    for name, function in {"sparse_probing": on_topics, "tpp": tpp, "scr": scr}.items():
        result = json.loads(json.dumps(function(evaluation)))
        found = output(name, result, sae, stream.config, sae_id="run", seed=5, **ABOUT)
        assert found is not None
        config = found["eval_config"]
        assert (config["model_name"], config["random_seed"], config["context_length"]) == ("testbed", 5, 128)
        if name == "sparse_probing":
            assert (config["probe_train_set_size"], config["probe_test_set_size"]) == (
                2 * -(-size // 2),
                2 * (size // 2),
            )
            assert config["dataset_names"] == ["topic"]
            assert config["k_values"] == [1, 2, 5, 10, 20]  # F = 48
        else:
            if name == "tpp":
                assert size // 2 <= config["train_set_size"] <= 2 * -(-size // 2)
            else:  # the biased set is as large, and half of it is one topic in one tone
                assert config["train_set_size"] == 4 * max(map(even_rows, range(0, 8, 2)))
            assert config["n_values"] == [2, 5, 10, 20]
            pairs = [] if name == "tpp" else [tuple(pair.split("/")) for pair in result["sets"]]
            assert [tuple(p) for one in config["column1_vals_lookup"].values() for p in one] == pairs
