"""SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench): results in its file format, one file per eval, and
`ForSAEBench`, an adapter for its runners. Figures that SAEBench doesn't have or defines differently are in
`eval_result_unstructured`.
"""

import statistics
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.config import SAEConfig, StreamConfig
from ..engine.errors import UserError
from ..engine.storage import checkpoint
from ..engine.unit_decoder import Dictionary, UnitDecoder, unit_decoder
from .evaluation import CHUNK, SAEBENCH
from .held_out import SAEBENCH_ROWS
from .meta_recipes import saebench_form

ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}
TOPS = (1, 2, 5, 10, 20, 50, 100)  # k of sparse probing
ABLATED = (2, 5, 10, 20, 50, 100, 500)  # n of SCR and TPP
SCR_FIGURES = ("scr_dir1", "scr_metric", "scr_dir2")

#: names of core's metrics by category
CORE_METRICS = {
    "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
    "model_performance_preservation": "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae",
    "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
    "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
    "sparsity": "l0 l1",
    "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
    "misc_metrics": "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
    "normalized_freq_over_10_percent average_max_encoder_cosine_sim average_max_decoder_cosine_sim frac_alive",
}

#: metrics by category, details, settings, and figures that SAEBench defines differently
Converted = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class DictionaryInfo:
    """A dictionary and how it was measured. `tokens`: number of training tokens, None if unknown."""

    sae: UnitDecoder
    stream: StreamConfig
    llm_dtype: str
    seed: int
    tokens: int | None


def file_name(release: str, sae_id: str) -> str:
    """SAEBench's name for the result file of a dictionary."""
    return f"{release}_{sae_id}_eval_results.json".replace("/", "_")


def output(
    name: str, result: dict[str, Any], sae: Dictionary, stream: StreamConfig, *, sae_id: str, llm_dtype: str,
    training_tokens: int | None, seed: int = 0,
) -> dict[str, Any] | None:  # fmt: skip
    """Convert the result of the eval `name` to SAEBench's format; None if it has no such eval or result, as for a
    transcoder, absorption on fewer than 20 letters or on other prompts, and SCR, TPP and meta structure with another
    protocol.

    All of SAEBench's settings are given as they were used. A figure has SAEBench's name if it is computed as SAEBench does.
    Others are in `eval_result_unstructured["temposae"]`.
    """
    if name not in MAKERS or "skipped" in result or sae.cfg.d_out is not None:
        return None
    about = DictionaryInfo(unit_decoder(sae), stream, llm_dtype, seed, training_tokens)
    if (converted := MAKERS[name](result, about)) is None:
        return None
    metrics, details, config, extras = converted
    source = result.get("of", {})
    return {
        "eval_type_id": TYPE_IDS.get(name, name),
        "eval_config": config,
        # the same result always gets the same id
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {sorted(source.items())} {sae_id}")),
        "datetime_epoch_millis": int(1000 * time.time()),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": "temposae",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": "temposae",
        "sae_lens_version": None,
        "sae_cfg_dict": _config(about.sae, stream, training_tokens) | {"temposae": sae.cfg.model_dump(mode="json")},
        "eval_result_unstructured": {
            "temposae": extras | {"seconds": result.get("seconds")},
            "controls": result.get("controls", {}),
        },
    }


def _pick(source: dict[str, Any], names: str) -> dict[str, Any]:
    """Select keys, given as one string separated by spaces."""
    return {name: source[name] for name in names.split()}


def _settings(about: DictionaryInfo, **settings: Any) -> dict[str, Any]:
    """The settings of an eval by SAEBench's names.

    All are given, because SAEBench replaces missing ones by its defaults. Numbers that don't apply to an eval are 0.
    """
    common = {"model_name": about.stream.model, "llm_dtype": about.llm_dtype, "random_seed": about.seed}
    return common | {"llm_batch_size": about.stream.rows_per_forward} | settings


def _core(result: dict[str, Any], about: DictionaryInfo) -> Converted | None:
    latents = result["latents"]
    rate = torch.tensor(latents["firing_rate"])
    W_enc, W_dec = (w.float().cpu() for w in (about.sae.W_enc.T, about.sae.W_dec))
    nearest = {"encoder": _nearest(W_enc), "decoder": _nearest(W_dec)}
    over_1, over_10 = rate > 0.01, rate > 0.1
    figures = result | result["saebench"]
    figures |= {
        "ce_loss_with_sae": result["ce"]["sae"],
        "ce_loss_without_sae": result["ce"]["clean"],
        "cossim": result["cosine"],
        "total_tokens_eval_reconstruction": result["ce_tokens"],
        "total_tokens_eval_sparsity_variance": result["tokens"],
        "freq_over_1_percent": float(over_1.float().mean()),
        "freq_over_10_percent": float(over_10.float().mean()),
        "normalized_freq_over_1_percent": _share(rate, over_1),
        "normalized_freq_over_10_percent": _share(rate, over_10),
        "average_max_encoder_cosine_sim": float(nearest["encoder"].mean()),
        "average_max_decoder_cosine_sim": float(nearest["decoder"].mean()),
        "frac_alive": float((rate > 0).float().mean()),
    }
    metrics = {category: _pick(figures, names) for category, names in CORE_METRICS.items()}
    if any(value is None for category in metrics.values() for value in category.values()):
        return None  # a score that SAEBench requires is missing, as when zero ablation does no harm
    firing = zip(latents["tokens_per_row"], latents["firing_rate"], strict=True)
    columns = {
        "feature_density": latents["firing_rate"],
        "consistent_activation_heuristic": [tokens if density else -1.0 for tokens, density in firing],
        "encoder_bias": about.sae.b_enc.tolist(),
        "encoder_norm": W_enc.norm(dim=1).tolist(),
        "encoder_decoder_cosine_sim": torch.cosine_similarity(W_enc, W_dec).tolist(),
        "max_decoder_cosine_sim": nearest["decoder"].tolist(),
        "max_encoder_cosine_sim": nearest["encoder"].tolist(),
    }
    lines = zip(*columns.values(), strict=True)
    details = [{"index": index} | dict(zip(columns, line, strict=True)) for index, line in enumerate(lines)]
    ours = "explained_variance mse ce_recovered ce_recovered_over_mean kl_recovered relative_reconstruction_bias ce kl"
    # activations above `max_norm` are neither reconstructed nor counted
    extras = _pick(result, f"{ours} rows ce_rows") | {"max_norm": about.stream.max_norm}
    return metrics, details, _core_settings(result, about), extras


def _core_settings(result: dict[str, Any], about: DictionaryInfo) -> dict[str, Any]:
    stream, batch = about.stream, SAEBENCH_ROWS
    computed = (
        "kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics",
        "featurewise_weight_based_metrics",
    )  # fmt: skip
    return {
        "model_name": stream.model,
        "llm_dtype": about.llm_dtype,
        "batch_size_prompts": batch,
        "n_eval_reconstruction_batches": -(-result["ce_rows"] // batch),
        "n_eval_sparsity_variance_batches": -(-result["rows"] // batch),
        "dataset": stream.data or f"the embedded language of {stream.model}",
        "context_size": len(result["per_position"]["position"]),
        **{f"compute_{name}": True for name in computed},
        "exclude_special_tokens_from_reconstruction": stream.drop_special,
        "verbose": False,
    }


def _sparse_probing(result: dict[str, Any], about: DictionaryInfo) -> Converted | None:
    def named(scores: dict[str, Any], prefix: str) -> dict[str, Any]:
        tops = {f"{prefix}_top_{k}_test_accuracy": scores.get(f"top_{k}") for k in TOPS}
        return {f"{prefix}_test_accuracy": scores["best_epoch_accuracy"]} | tops

    every = {"mean over sets": result, **result["sets"]}
    if any(scores["llm"]["best_epoch_accuracy"] is None for scores in every.values()):
        return None
    details = [
        {"dataset_name": f"{name}_results"} | named(scores["llm"], "llm") | named(scores, "sae")
        for name, scores in result["sets"].items()
    ]
    used = result["protocol"]
    config = _settings(about, **used, sae_batch_size=_rows_encoded(used["context_length"]), lower_vram_usage=False)
    full_width = {
        name: {"sae_test_accuracy": scores["test_accuracy"], "llm_test_accuracy": scores["llm"]["test_accuracy"]}
        for name, scores in every.items()
    }
    sizes = {
        name: {label: _pick(counts, "train_rows test_rows") for label, counts in scores["classes"].items()}
        for name, scores in result["sets"].items()
    }
    note = "of a probe that ends on its training loss; set sizes above are the largest of a class"
    metrics = {"llm": named(result["llm"], "llm"), "sae": named(result, "sae")}
    return metrics, details, config, {"full_width_probe": full_width | {"about": note}, "rows": sizes}


def _unlearning(result: dict[str, Any], about: DictionaryInfo) -> Converted | None:
    names = ("retain_threshold", "latents", "multiplier")
    thresholds, counts, multipliers = (sorted({setting[name] for setting in result["settings"]}) for name in names)
    if any(multiplier != int(multiplier) for multiplier in multipliers):
        return None  # SAEBench's multipliers are integers
    config = _settings(
        about,
        **result["protocol"],
        intervention_method="clamp_feature_activation",
        retain_thresholds=thresholds,
        n_features_list=counts,
        multipliers=list(map(int, multipliers)),
        n_batch_loss_added=0,
        save_metrics=True,
    )
    keys = ("retained", "setting", "settings", "loss_increase", "answer_orders", "questions", "texts")
    return {"unlearning": {"unlearning_score": result["score"]}}, [], config, {key: result.get(key) for key in keys}


SEEDS = "means over seeds, each with its own split and probes; set sizes are the largest of a probe"


def _ablation(result: dict[str, Any], about: DictionaryInfo, *, name: str, figures: str) -> Converted | None:
    if result.get("protocol_name") != SAEBENCH:
        return None  # other probes and other latents than SAEBench's
    used, is_scr = result["protocol"], name == "scr"
    config = _settings(
        about,
        **used,
        perform_scr=is_scr,
        sae_batch_size=_rows_encoded(used["context_length"]),
        lower_vram_usage=False,
    )

    def named(scores: dict[str, Any]) -> dict[str, Any]:
        if is_scr:
            by_n = ((f"{key}_threshold_{n}", v) for key in SCR_FIGURES for n, v in scores[key].items())
        else:
            by_n = ((f"tpp_threshold_{n}_{key}", v) for n, of_n in scores["tpp"].items() for key, v in of_n.items())
        return {key: value for key, value in by_n if int(key.split("_threshold_")[1].split("_")[0]) in ABLATED}

    details = [
        {"dataset_name": f"{_run_name(set_name, scores, is_scr)}_results"} | named(scores)
        for set_name, scores in result["sets"].items()
    ]
    return {f"{name}_metrics": named(result)}, details, config, _pick(result, figures) | {"about": SEEDS}


def _run_name(set_name: str, scores: dict[str, Any], is_scr: bool) -> str:
    """SAEBench's name of a set, or of a pair of its classes."""
    return f"{scores['of']}_scr_{'_'.join(scores['pair'])}" if is_scr else f"{set_name}_tpp"


def _absorption(result: dict[str, Any], about: DictionaryInfo) -> Converted | None:
    used = result["protocol"]
    probed = {a: scores for a, scores in result["letters"].items() if scores["probe_f1"] > used["min_GT_probe_f1"]}
    counted = {a: scores for a, scores in probed.items() if scores["known"]}
    if used["prompt_template"] is None or len(probed) < used["min_feats_for_eval"] or not counted:
        return None
    details = [
        {
            "first_letter": letter,
            "mean_absorption_fraction": scores["absorption_fraction"],
            "full_absorption_rate": scores["absorption"],
            "num_full_absorption": scores["absorbed"],
            "num_probe_true_positives": scores["known"],
            "num_split_features": len(scores["main"]),
        }
        for letter, scores in counted.items()
    ]
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    columns = {name: [detail[key] for detail in details] for name, key in names.items()}
    means = {f"mean_{name}": float(statistics.fmean(values)) for name, values in columns.items()}
    spreads = {f"std_dev_{name}": statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in columns.items()}
    extras = {
        "mean_main_f1": result["mean_main_f1"],
        "about": "the probe on activations is a logistic regression with balanced classes; half of the words train it",
    }
    return {"mean": means | spreads}, details, _settings(about, **used), extras


def _meta_structure(result: dict[str, Any], about: DictionaryInfo) -> Converted | None:
    if (converted := saebench_form(result, about.seed)) is None:
        return None
    metrics, config, extras = converted
    return metrics, [], config, extras


#: SAEBench's names of evals that it calls otherwise
TYPE_IDS = {"absorption": "absorption_first_letter", "meta_structure": "meta_structure_decoder_variance"}
MAKERS = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "unlearning": _unlearning,
    "scr": partial(_ablation, name="scr", figures="seeds spread sets"),
    "tpp": partial(_ablation, name="tpp", figures="seeds spread clean_accuracy"),
    "absorption": _absorption,
    "meta_structure": _meta_structure,
}


def _rows_encoded(context: int) -> int:
    return max(1, CHUNK // context)


def _share(rate: Tensor, chosen: Tensor) -> float:
    """Share of all firings that belong to the `chosen` latents, bool [F]."""
    total = float(rate.sum())
    return float(rate[chosen].sum()) / total if total else 0.0


def _nearest(W: Tensor) -> Tensor:
    """The largest cosine of each row [F, D] with another row, [F]; in blocks, to limit memory."""
    unit = torch.nn.functional.normalize(W, dim=1)
    largest = []
    for start in range(0, len(unit), 2048):
        cosine = unit[start : start + 2048] @ unit.T
        cosine.diagonal(start).fill_(-1)
        largest.append(cosine.amax(1))
    return torch.cat(largest)


def _config(sae: UnitDecoder, stream: StreamConfig, tokens: int | None) -> dict[str, Any]:
    """SAEBench's description of a dictionary trained on `tokens` tokens."""
    return {
        "model_name": stream.model, "hook_name": stream.hook, "hook_layer": _layer(stream.hook),
        "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "architecture": architecture(sae.cfg),
        "dtype": "float32", "prepend_bos": stream.bos is not False, "context_size": stream.context,
        "hook_head_index": None,
    } | ({} if tokens is None else {"training_tokens": tokens})  # fmt: skip


def architecture(cfg: SAEConfig) -> str:
    """SAEBench's name of an architecture, followed by the parts and the mask, which SAEBench doesn't have."""
    names = [ARCHITECTURES[cfg.activation], *(part["kind"] for part in cfg.parts)]
    if cfg.prefixes is not None:
        names.insert(0, "matryoshka")
    if cfg.mask.kind != "none":
        names.append(f"{cfg.mask.kind}_mask")
    return "_".join(names)


class _Config(SimpleNamespace):
    """Settings that SAEBench reads, and may add to."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class ForSAEBench(nn.Module):
    """Adapter of a dictionary for SAEBench's runners: `run_eval(config, [("mine", ForSAEBench.load("runs/demo"))], ...)`.

    Rows of W_dec [F, D] have norm 1, as its evals expect (`UnitDecoder`); x_hat doesn't change. Activations x are whole rows
    [B, T, D], so that positions are known. A dictionary without a mask also takes [n, D], which SAEBench's absorption uses.
    Weights keep their precision; `dtype` is that of results. Raises UserError for a transcoder.
    """

    def __init__(self, sae: Dictionary, stream: StreamConfig, training_tokens: int | None = None):
        super().__init__()
        if sae.cfg.d_out is not None:
            raise UserError("sae: a transcoder is not allowed; SAEBench reconstructs the activations that were encoded")
        self.sae, self.dtype = unit_decoder(sae), torch.float32
        unused: dict[str, Any] = {"model_from_pretrained_kwargs": {}, "normalize_activations": "none"}
        unused |= {"dataset_path": "", "dataset_trust_remote_code": False, "seqpos_slice": (None,)}
        self.cfg = _Config(**_config(self.sae, stream, training_tokens), **unused, device=str(self.device))

    @classmethod
    def load(cls, path: str | Path) -> "ForSAEBench":
        """Load the dictionary of a run folder or of a checkpoint with its settings."""
        run_checkpoint = checkpoint.find(Path(path))
        if run_checkpoint.run is None:
            raise UserError(
                f"path: {path} does not say what it was trained on; use ForSAEBench(sae, StreamConfig(...))"
            )
        return cls(run_checkpoint.dictionary(), run_checkpoint.run.stream, run_checkpoint.tokens)

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def W_enc(self) -> Tensor:
        """[D, F]"""
        return self.sae.W_enc.to(self.dtype)

    @property
    def W_dec(self) -> Tensor:
        """[F, D], rows of norm 1, or 0 for a latent without direction"""
        return self.sae.W_dec.to(self.dtype)

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc.to(self.dtype)

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec.to(self.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """f [..., F] of x [B, T, D] or [n, D], in the dtype of x."""
        pos = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if x.ndim == 3 else None
        return self.sae.encode(x, pos)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        """x_hat [..., D] of f [..., F], in the dtype of f."""
        return self.sae.decode(f)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "ForSAEBench":
        target = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        self.dtype = target.dtype
        self.sae.to(target.device)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(target.device)
        return self


def _layer(hook: str | None) -> int:
    pieces = (hook or "").split(".")
    return int(pieces[1]) if len(pieces) > 1 and pieces[1].isdecimal() else 0
