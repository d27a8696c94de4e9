"""Both ways to SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench): our results in the form in which it writes its
own, one file an eval, so that its tools read them beside theirs; and `ForSAEBench`, with which its runners take our
dictionaries. What it has no place for is in `eval_result_unstructured`.
"""

import statistics
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import checkpoint
from ..engine.config import StreamConfig
from ..engine.errors import UserError
from ..engine.sae import SparseAutoencoder

ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "batchtopk", "jumprelu": "jumprelu"}


def file_name(release: str, sae_id: str) -> str:
    """What SAEBench calls the result of a dictionary."""
    return f"{release}_{sae_id}_eval_results.json".replace("/", "_")


def output(
    name: str, result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig, *, sae_id: str, seed: int = 0
) -> dict[str, Any] | None:
    """The result of the eval `name` of a dictionary as SAEBench would write it; None for one that it doesn't have, or that
    found nothing to measure."""
    makers = {
        "core": _core, "sparse_probing": _sparse_probing, "unlearning": _unlearning, "scr": _scr, "tpp": _tpp,
        "absorption": _absorption,
    }  # fmt: skip
    if name not in makers or "skipped" in result or (made := makers[name](result, sae, stream)) is None:
        return None
    metrics, details, config = made
    of = result.get("of", {})
    return {
        "eval_type_id": "absorption_first_letter" if name == "absorption" else name,
        "eval_config": {"model_name": stream.model, "llm_dtype": "float32"}
        | config
        | ({} if name == "core" else {"random_seed": seed}),
        # the same result has the same name, whenever it is written
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {sorted(of.items())} {sae_id}")),
        "datetime_epoch_millis": int(1000 * time.time()),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": "temposae",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": "temposae",
        "sae_lens_version": None,
        "sae_cfg_dict": _config(sae, stream),
        "eval_result_unstructured": {"controls": result.get("controls", {}), "seconds": result.get("seconds")},
    }  # fmt: skip


#: metrics by category, details, and the settings that SAEBench has a name for
Made = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]


def _core(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made:
    rate = torch.tensor(result["latents"]["firing_rate"])
    W_enc, W_dec = (w.detach().float().cpu() for w in (sae.W_enc.T, sae.W_dec))
    nearest = {"encoder": _nearest(W_enc), "decoder": _nearest(W_dec)}
    theirs = result["saebench"]
    metrics = {
        "model_behavior_preservation": {
            key: theirs[key] for key in ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae")
        },
        "model_performance_preservation": {
            "ce_loss_score": theirs["ce_loss_score"],
            "ce_loss_with_ablation": theirs["ce_loss_with_ablation"],
            "ce_loss_with_sae": result["ce"]["sae"],
            "ce_loss_without_sae": result["ce"]["clean"],
        },
        "reconstruction_quality": {
            **{key: theirs[key] for key in ("explained_variance", "explained_variance_legacy")},
            "mse": result["mse"],
            "cossim": result["cosine"],
        },
        "shrinkage": {
            key: result[key] for key in ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias")
        },
        "sparsity": {"l0": result["l0"], "l1": result["l1"]},
        "token_stats": {
            "total_tokens_eval_reconstruction": result["ce_tokens"],
            "total_tokens_eval_sparsity_variance": result["tokens"],
        },
        "misc_metrics": {
            "freq_over_1_percent": float((rate > 0.01).float().mean()),
            "freq_over_10_percent": float((rate > 0.1).float().mean()),
            "normalized_freq_over_1_percent": _share(rate, 0.01),
            "normalized_freq_over_10_percent": _share(rate, 0.1),
            "average_max_encoder_cosine_sim": float(nearest["encoder"].mean()),
            "average_max_decoder_cosine_sim": float(nearest["decoder"].mean()),
            "frac_alive": float((rate > 0).float().mean()),
        },
    }
    norms, between = W_enc.norm(dim=1), torch.cosine_similarity(W_enc, W_dec) if W_enc.shape == W_dec.shape else None
    bias = sae.b_enc.tolist()
    details = [
        {
            "index": index,
            "feature_density": result["latents"]["firing_rate"][index],
            "consistent_activation_heuristic": result["latents"]["tokens_per_row"][index],
            "encoder_bias": bias[index],
            "encoder_norm": float(norms[index]),
            "encoder_decoder_cosine_sim": 0.0 if between is None else float(between[index]),
            "max_decoder_cosine_sim": float(nearest["decoder"][index]),
            "max_encoder_cosine_sim": float(nearest["encoder"][index]),
        }
        for index in range(sae.cfg.d_sae)
    ]
    measured = (
        "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
        "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
        "exclude_special_tokens_from_reconstruction",
    )  # fmt: skip
    text = stream.data or f"the embedded language of {stream.model}"
    return metrics, details, dict.fromkeys(measured, True) | {"dataset": text, "context_size": stream.context}


def _sparse_probing(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made:
    def named(scores: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {f"{prefix}_{key}": scores[key] for key in ("test_accuracy",) if scores.get(key) is not None}
        tops = (key for key in scores if key.startswith("top_") and key.removeprefix("top_").isdecimal())
        return found | {f"{prefix}_{key}_test_accuracy": scores[key] for key in tops if scores[key] is not None}

    details = [
        {"dataset_name": f"{name}_results"} | named(of["llm"], "llm") | named(of, "sae")
        for name, of in result["sets"].items()
    ]
    config = {"dataset_names": list(result["sets"]), "context_length": stream.context}
    return {"llm": named(result["llm"], "llm"), "sae": named(result, "sae")}, details, config


def _unlearning(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made:
    names = {"retain_thresholds": "retain_threshold", "n_features_list": "latents", "multipliers": "multiplier"}
    config = {name: sorted({setting[own] for setting in result["settings"]}) for name, own in names.items()}
    return {"unlearning": {"unlearning_score": result["score"]}}, [], config


def _scr(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made:
    def named(scores: dict[str, Any]) -> dict[str, Any]:
        keys = [key for key in ("scr_dir1", "scr_metric", "scr_dir2") if key in scores]
        values = {f"{key}_threshold_{n}": value for key in keys for n, value in scores[key].items()}
        return {name: value for name, value in values.items() if value is not None}

    details = [{"dataset_name": f"{name}_results"} | named(of) for name, of in result["sets"].items()]
    return {"scr_metrics": named(result)}, details, {"perform_scr": True, "dataset_names": list(result["sets"])}


def _tpp(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made:
    metrics = {f"tpp_threshold_{n}_{key}": value for n, of in result["tpp"].items() for key, value in of.items()}
    return {"tpp_metrics": metrics}, [], {"perform_scr": False, "n_values": [int(n) for n in result["tpp"]]}


def _absorption(result: dict[str, Any], sae: SparseAutoencoder, stream: StreamConfig) -> Made | None:
    config = {name: result["settings"][name] for name in ("min_GT_probe_f1", "f1_jump_threshold", "max_k_value")}
    told = {a: of for a, of in result["letters"].items() if of["probe_f1"] > config["min_GT_probe_f1"] and of["known"]}
    if not told:
        return None
    details = [
        {
            "first_letter": letter,
            "mean_absorption_fraction": of["absorption_fraction"],
            "full_absorption_rate": of["absorption"],
            "num_full_absorption": of["absorbed"],
            "num_probe_true_positives": of["known"],
            "num_split_features": len(of["main"]),
        }
        for letter, of in told.items()
    ]
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    columns = {name: [detail[key] for detail in details] for name, key in names.items()}
    means = {f"mean_{name}": float(statistics.fmean(values)) for name, values in columns.items()}
    spreads = {f"std_dev_{name}": statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in columns.items()}
    return {"mean": means | spreads}, details, config


def _share(rate: Tensor, limit: float) -> float:
    """Of all activations, the share that latents have which fire more often than that."""
    total = float(rate.sum())
    return float(rate[rate > limit].sum()) / total if total else 0.0


def _nearest(W: Tensor) -> Tensor:
    """The largest cosine of each row [F, D] with another row [F], a few thousand rows at a time."""
    unit = torch.nn.functional.normalize(W, dim=1)
    found = []
    for at in range(0, len(unit), 2048):
        cosine = unit[at : at + 2048] @ unit.T
        here = torch.arange(len(cosine))
        cosine[here, at + here] = -1
        found.append(cosine.amax(1))
    return torch.cat(found)


def _config(sae: SparseAutoencoder, stream: StreamConfig) -> dict[str, Any]:
    """What SAEBench wants to know of a dictionary."""
    return {
        "model_name": stream.model, "hook_name": stream.hook, "hook_layer": _layer(stream.hook),
        "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "architecture": ARCHITECTURES[sae.cfg.activation],
        "dtype": "float32", "prepend_bos": True, "context_size": stream.context, "hook_head_index": None,
    }  # fmt: skip


class _Config(SimpleNamespace):
    """Settings that SAEBench reads, and adds to."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class ForSAEBench(nn.Module):
    """A dictionary for SAEBench's runners: `run_eval(config, [("mine", ForSAEBench.load("runs/demo"))], device, ...)`.

    Rows of W_dec [F, D] have norm 1, as its evals expect, and latents are as much larger: f_j |W_dec_j|; x_hat is the same.
    Activations x come as whole rows [B, T, D], of which the places are the positions; a dictionary without a mask over
    positions takes [n, D], too, which SAEBench's absorption gives. Weights stay in their own precision; `dtype` is that of
    results. Raises UserError for a transcoder.
    """

    def __init__(self, sae: SparseAutoencoder, stream: StreamConfig):
        super().__init__()
        if sae.cfg.d_out is not None:
            raise UserError("sae: a transcoder is not allowed; SAEBench reconstructs the activations that were encoded")
        self.sae, self.dtype = sae, torch.float32
        unused: dict[str, Any] = {
            "training_tokens": -1,
            "model_from_pretrained_kwargs": {},
            "normalize_activations": "none",
        }
        unused |= {"dataset_path": "", "dataset_trust_remote_code": False, "seqpos_slice": (None,)}
        self.cfg = _Config(**_config(sae, stream), **unused, device=str(self.device))

    @classmethod
    def load(cls, path: str | Path) -> "ForSAEBench":
        """The dictionary of a run folder or of a checkpoint with its settings."""
        found = checkpoint.find(Path(path))
        if found.run is None:
            raise UserError(f"{path} does not say what it was trained on; use ForSAEBench(sae, StreamConfig(...))")
        return cls(found.dictionary(), found.run.stream)

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def _norm(self) -> Tensor:
        norm = self.sae.W_dec.detach().norm(dim=1)
        return torch.where(norm > 0, norm, 1)

    @property
    def W_enc(self) -> Tensor:
        """[D, F]"""
        return (self.sae.W_enc.detach() * self._norm).to(self.dtype)

    @property
    def W_dec(self) -> Tensor:
        """[F, D], rows of norm 1; of norm 0 where a latent has no direction"""
        return (self.sae.W_dec.detach() / self._norm[:, None]).to(self.dtype)

    @property
    def b_enc(self) -> Tensor:
        return (self.sae.b_enc.detach() * self._norm).to(self.dtype)

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec.detach().to(self.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """f [..., F] of x [B, T, D] or [n, D], in the dtype of x."""
        pos = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if x.ndim == 3 else None
        return self.sae.encode(x, pos) * self._norm.to(x.dtype)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        """x_hat [..., D] of f [..., F], in the dtype of f."""
        return self.sae.decode(f / self._norm.to(f.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> "ForSAEBench":
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        self.dtype = wanted.dtype
        self.sae.to(wanted.device)
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(wanted.device)
        return self


def _layer(hook: str | None) -> int:
    parts = (hook or "").split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
