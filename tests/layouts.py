"""Checkpoints as releases of other libraries wrote them, small and random, and what each computes by its formula in float64.

A `Case` writes a folder and says f [N, F] and x_hat [N, D] of x [N, D]. The formulas are written for these tests from the
libraries' own code, apart from our readers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K, N = 12, 120, 5, 200
HOOK, TARGET, HEADS = "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.2.attn.hook_z"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * len(shape) + sum(shape) + seed))


X = 3 * drawn(N, D)
W_ENC, W_DEC, B_ENC, B_DEC = drawn(D, F), drawn(F, D), 0.3 * drawn(F), drawn(D, seed=1)
THRESHOLD, FACTOR, GATE, R_MAG = (
    2 * drawn(F, seed=2).abs(),
    0.5 + drawn(F, seed=3).abs(),
    drawn(F, seed=4),
    0.3 * drawn(F, seed=5),
)
NORM = W_DEC.double().norm(dim=1)
CORE = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
JUMP = CORE | {"threshold": THRESHOLD}
GATED = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": GATE, "b_mag": B_ENC, "r_mag": R_MAG}


@dataclass(frozen=True)
class Case:
    """`write` makes the folder's files; `f` and `x_hat` are what the dictionary there computes of X. `loads`: whether the
    library's own loader of today can read it, so that it can be asked."""

    write: Callable[[Path], None]
    f: Callable[[], Tensor]
    x_hat: Callable[[Tensor], Tensor] = field(default=lambda f: f @ W_DEC.double() + B_DEC.double())
    loads: bool = True
    folder: str = "folder"


def pre(x: Tensor = X, *, center: bool = True, b: Tensor = B_ENC) -> Tensor:
    return (x.double() - (B_DEC.double() if center else 0)) @ W_ENC.double() + b.double()


def top(acts: Tensor, k: int = K) -> Tensor:
    kept = acts.relu().topk(k, dim=1)
    return torch.zeros_like(acts).scatter_(1, kept.indices, kept.values)


def above(acts: Tensor, threshold: Tensor | float) -> Tensor:
    return acts.relu() * (acts > threshold)


def gate(center: bool = True) -> Tensor:
    x_w = pre(center=center, b=torch.zeros(F))
    return (x_w * R_MAG.double().exp() + B_ENC.double()).relu() * (x_w + GATE.double() > 0)


def files(
    settings: str | None, cfg: dict[str, Any], weights: str, tensors: dict[str, Tensor], wrap: bool = False
) -> Callable[[Path], None]:
    """Writes a folder with these two files. `wrap`: tensors are in the file under "sae"."""

    def write(folder: Path) -> None:
        place = folder / weights
        place.parent.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            (folder / settings).write_text(json.dumps(cfg))
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if place.suffix == ".safetensors":
            save_file(held, place)
        elif place.suffix == ".pt":
            torch.save({"sae": held, "version": "1"} if wrap else held, place)
        else:
            np.savez(place, **{name: tensor.numpy() for name, tensor in held.items()})  # pyright: ignore[reportArgumentType]

    return write


# SAELens: https://github.com/decoderesearch/SAELens, sae_lens/loading and sae_lens/saes ------------------------------------


def saelens(cfg: dict[str, Any], tensors: dict[str, Tensor], name: str = "cfg.json") -> Callable[[Path], None]:
    return files(name, cfg, "sae_weights.safetensors", tensors)


#: as the first releases had them, before architecture and activation_fn_str
FIRST: dict[str, Any] = {
    "model_name": "gpt2-small", "hook_point": HOOK, "hook_point_layer": 2, "hook_point_head_index": None,
    "dataset_path": "some/text", "context_size": 64, "d_in": D, "d_sae": F, "expansion_factor": F // D,
    "dtype": "torch.float32",
    "device": "cpu", "l1_coefficient": 0.001, "use_ghost_grads": False,
}  # fmt: skip
#: of versions 3 to 5
FLAT: dict[str, Any] = {
    "architecture": "standard", "d_in": D, "d_sae": F, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "context_size": 64, "model_name": "gpt2-small", "hook_name": HOOK, "hook_layer": 2,
    "hook_head_index": None, "prepend_bos": True, "dataset_path": "some/text", "dataset_trust_remote_code": True,
    "normalize_activations": "none", "dtype": "float32", "device": "cpu", "sae_lens_training_version": "5.3.0",
    "activation_fn_kwargs": {}, "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
    "sae_lens_version": "5.3.0",
}  # fmt: skip
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
#: of version 6
NESTED: dict[str, Any] = {
    "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.0.0", "sae_lens_training_version": "6.0.0", "model_name": "gpt2-small", "hook_name": HOOK,
        "context_size": 64, "prepend_bos": True, "dataset_path": "some/text",
    },
}  # fmt: skip


def without(cfg: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in cfg.items() if name not in names}


def nested(architecture: str, **changes: Any) -> dict[str, Any]:
    return NESTED | {"architecture": architecture} | changes


def scaled(folder: Path) -> None:
    """A checkpoint of SAELens' trainer, before it folds in what activations were scaled by."""
    cfg = nested("batchtopk", k=K, rescale_acts_by_decoder_norm=True, normalize_activations="expected_average_only_in")
    saelens(cfg, CORE | {"topk_threshold": torch.tensor(2.0, dtype=torch.float64)})(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25, "has_whitening": False}))


OF_UNIT_ROWS: Callable[[Tensor], Tensor] = lambda f: (f / NORM) @ W_DEC.double() + B_DEC.double()
SAELENS = {
    "first": Case(saelens(FIRST, CORE), lambda: pre().relu()),
    "first, with factors that are 1": Case(
        saelens(FIRST | {"normalize_activations": False}, CORE | {"scaling_factor": torch.ones(F)}), lambda: pre().relu()
    ),
    "first, without d_sae": Case(saelens(without(FIRST, "d_sae"), CORE), lambda: pre().relu(), loads=False),
    "flat": Case(saelens(FLAT, CORE), lambda: pre().relu()),
    "flat, without a version": Case(saelens(without(FLAT, "sae_lens_version"), CORE), lambda: pre().relu()),
    "flat, not centered": Case(
        saelens(FLAT | {"apply_b_dec_to_input": False, "normalize_activations": None}, CORE),
        lambda: pre(center=False).relu(),
    ),
    "flat, of heads": Case(saelens(FLAT | {"hook_name": HEADS}, CORE), lambda: pre().relu(), loads=False),
    "flat topk": Case(saelens(FLAT | TOPK, CORE), lambda: top(pre())),
    "flat topk, without a version": Case(
        saelens(without(FLAT | TOPK, "sae_lens_version", "apply_b_dec_to_input"), CORE), lambda: top(pre())
    ),
    "flat topk, k twice": Case(
        saelens(FLAT | TOPK | {"architecture": "topk", "k": 7}, CORE), lambda: top(pre())
    ),
    "flat gated": Case(saelens(FLAT | {"architecture": "gated"}, GATED), gate),
    "flat jumprelu": Case(saelens(FLAT | {"architecture": "jumprelu"}, JUMP), lambda: above(pre(), THRESHOLD.double())),
    "flat, latents have factors": Case(
        saelens(FLAT | {"finetuning_scaling_factor": True}, CORE | {"scaling_factor": FACTOR}), lambda: pre().relu(),
        lambda f: (f * FACTOR.double()) @ W_DEC.double() + B_DEC.double(), loads=False,
    ),
    "nested": Case(saelens(nested("standard"), CORE), lambda: pre().relu()),
    "nested, little said": Case(
        saelens({name: nested("standard")[name] for name in ("architecture", "d_in", "d_sae", "dtype", "metadata")}, CORE),
        lambda: pre().relu(),
    ),
    "nested, in bfloat16": Case(
        saelens(nested("standard", dtype="bfloat16"), {name: tensor.bfloat16() for name, tensor in CORE.items()}),
        lambda: ((X.double() - B_DEC.bfloat16().double()) @ W_ENC.bfloat16().double() + B_ENC.bfloat16().double()).relu(),
        lambda f: f @ W_DEC.bfloat16().double() + B_DEC.bfloat16().double(),
    ),
    "nested topk": Case(saelens(nested("topk", k=K), CORE), lambda: top(pre())),
    "nested topk, without k": Case(saelens(nested("topk"), CORE), lambda: top(pre(), 100)),
    "nested topk that counts norms": Case(
        saelens(nested("topk", k=K, rescale_acts_by_decoder_norm=True), CORE), lambda: top(pre() * NORM), OF_UNIT_ROWS
    ),
    "nested jumprelu": Case(saelens(nested("jumprelu"), JUMP), lambda: above(pre(), THRESHOLD.double())),
    "nested gated": Case(saelens(nested("gated", apply_b_dec_to_input=False), GATED), lambda: gate(center=False)),
    "nested transcoder": Case(
        saelens(nested("transcoder", d_out=D, apply_b_dec_to_input=False), CORE), lambda: pre(center=False).relu()
    ),
    "nested jumprelu transcoder": Case(
        saelens(nested("jumprelu_transcoder", d_out=D, apply_b_dec_to_input=False), JUMP),
        lambda: above(pre(center=False), THRESHOLD.double()),
    ),
    "training batchtopk": Case(
        saelens(
            nested("batchtopk", k=K, rescale_acts_by_decoder_norm=False),
            CORE | {"topk_threshold": torch.tensor(2.0).double()},
        ),
        lambda: above(pre(), 2.0),
    ),
    "training matryoshka": Case(
        saelens(
            nested("matryoshka_batchtopk", k=K, rescale_acts_by_decoder_norm=True, matryoshka_widths=[20, 60, F]),
            CORE | {"topk_threshold": torch.tensor(6.0).double()},
        ),
        lambda: above(pre() * NORM, 6.0), OF_UNIT_ROWS,
    ),
    "training batchtopk of scaled activations": Case(
        scaled, lambda: above(pre(X * 0.25) * NORM, 2.0) / 0.25,
        lambda f: (f / NORM) @ W_DEC.double() + B_DEC.double() / 0.25,
    ),
    "training jumprelu": Case(
        saelens(nested("jumprelu"), CORE | {"log_threshold": THRESHOLD.log()}), lambda: above(pre(), THRESHOLD.double()),
    ),
}  # fmt: skip


# dictionary_learning: https://github.com/saprmarks/dictionary_learning, dictionary.py and trainers -------------------------


def learned(tensors: dict[str, Tensor], file: str = "ae.pt", **trainer: Any) -> Callable[[Path], None]:
    about = {
        "activation_dim": D,
        "dict_size": F,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "layer": 2,
        "device": "cuda:0",
    }
    about |= {"submodule_name": "resid_post_layer_2", "steps": 1000, "lr": 1e-3, "wandb_name": "x"}
    return files("config.json", {"trainer": about | trainer, "buffer": {"ctx_len": 64, "io": "out"}}, file, tensors)


def linear(bias: str, **others: Tensor) -> dict[str, Tensor]:
    return {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, bias: B_DEC, **others}


K_OF = {"k": torch.tensor(K, dtype=torch.int32)}
ABOVE_4 = {"threshold": torch.tensor(4.0)}
GATED_DL = {
    "encoder.weight": W_ENC.T, "decoder.weight": W_DEC.T, "decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": GATE,
    "mag_bias": B_ENC,
}  # fmt: skip
GROUPS = {"group_sizes": torch.tensor([20, 40, 60])}
DICTIONARY_LEARNING = {
    "AutoEncoder": Case(
        learned(linear("bias"), dict_class="AutoEncoder", trainer_class="StandardTrainer"), lambda: pre().relu() * NORM,
        OF_UNIT_ROWS,
    ),
    "AutoEncoder, before dict_class": Case(
        learned(linear("bias"), trainer_class="PAnnealTrainer"), lambda: pre().relu() * NORM, OF_UNIT_ROWS, loads=False
    ),
    "AutoEncoder of a step": Case(
        learned(linear("bias"), "checkpoints/ae_500.pt", dict_class="AutoEncoder"), lambda: pre().relu() * NORM,
        OF_UNIT_ROWS, loads=False, folder="folder/checkpoints/ae_500.pt",
    ),
    "AutoEncoderNew": Case(
        learned(linear("decoder.bias"), dict_class="AutoEncoderNew", trainer_class="StandardTrainerNew"),
        lambda: pre(center=False).relu(),
    ),
    "GatedAutoEncoder": Case(learned(GATED_DL, dict_class="GatedAutoEncoder"), gate),
    "AutoEncoderTopK": Case(
        learned(linear("b_dec", **K_OF, threshold=torch.tensor(-1.0)), dict_class="AutoEncoderTopK", k=K), lambda: top(pre())
    ),
    "AutoEncoderTopK with a threshold": Case(
        learned(linear("b_dec", **K_OF, **ABOVE_4), dict_class="AutoEncoderTopK", k=K), lambda: top(pre())
    ),
    "AutoEncoderTopK, first": Case(
        learned(linear("b_dec"), dict_class="AutoEncoderTopK", trainer_class="TrainerTopK", k=K), lambda: top(pre()),
        loads=False,
    ),
    "BatchTopKSAE": Case(
        learned(linear("b_dec", **K_OF, **ABOVE_4), dict_class="BatchTopKSAE", k=K), lambda: above(pre(), 4.0)
    ),
    "BatchTopKSAE, whose threshold was not followed": Case(
        learned(linear("b_dec", **K_OF, threshold=torch.tensor(-1.0)), dict_class="BatchTopKSAE", k=K), lambda: pre().relu()
    ),
    "MatryoshkaBatchTopKSAE": Case(
        learned(CORE | K_OF | ABOVE_4 | GROUPS, dict_class="MatryoshkaBatchTopKSAE", k=K), lambda: above(pre(), 4.0)
    ),
    "MatroyshkaBatchTopKSAE": Case(
        learned(CORE | K_OF | ABOVE_4 | GROUPS, dict_class="MatroyshkaBatchTopKSAE", k=K), lambda: above(pre(), 4.0),
        loads=False,
    ),
    "JumpReluAutoEncoder": Case(
        learned(JUMP, dict_class="JumpReluAutoEncoder", trainer_class="TrainerJumpRelu"),
        lambda: above(pre(center=False), THRESHOLD.double()),
    ),
}  # fmt: skip


# sparsify: https://github.com/EleutherAI/sparsify, sparse_coder.py and config.py -------------------------------------------


def sparsify(encoder: Tensor = W_ENC, **cfg: Any) -> Callable[[Path], None]:
    tensors = {"encoder.weight": encoder.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    return files("cfg.json", cfg | {"d_in": D}, "sae.safetensors", tensors)


def by_default(folder: Path) -> None:
    """32 latents for every dimension, and 32 of them kept."""
    wide = {
        "encoder.weight": drawn(32 * D, D),
        "encoder.bias": drawn(32 * D),
        "W_dec": drawn(32 * D, D, seed=1),
        "b_dec": B_DEC,
    }
    files("cfg.json", {"d_in": D}, "sae.safetensors", wide)(folder)


def of_default() -> Tensor:
    return top((X.double() - B_DEC.double()) @ drawn(32 * D, D).double().T + drawn(32 * D).double(), 32)


LATER = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "multi_topk": False,
    "skip_connection": False,
}  # fmt: skip
SPARSIFY = {
    "first": Case(sparsify(expansion_factor=F // D, normalize_decoder=True, k=K, signed=False), lambda: top(pre())),
    "num_latents 0": Case(
        sparsify(expansion_factor=F // D, normalize_decoder=True, num_latents=0, k=K), lambda: top(pre())
    ),
    "by default": Case(by_default, of_default, lambda f: f @ drawn(32 * D, D, seed=1).double() + B_DEC.double()),
    "later": Case(sparsify(**LATER, transcode=False), lambda: top(pre())),
    "transcoder": Case(sparsify(**LATER, transcode=True), lambda: top(pre(center=False))),
}


# Gemma Scope: https://huggingface.co/google/gemma-scope, and SAELens' loaders of it ----------------------------------------

LOWER = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
RES, TRANSCODER = (
    "gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_9",
    "gemma-scope-2b-pt-transcoders/layer_2/width_16k/l0",
)
JUMPED: Callable[[], Tensor] = lambda: above(pre(center=False), THRESHOLD.double())


def npz(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return files(None, {}, "params.npz", tensors)


def second(tensors: dict[str, Tensor], **cfg: Any) -> Callable[[Path], None]:
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.2.output"}
    return files("config.json", about | cfg, "params.safetensors", tensors)


GEMMA_SCOPE = {
    "res": Case(npz(JUMP), JUMPED, folder=RES),
    "res, other names": Case(npz(LOWER | {"scaling_factor": torch.ones(F)}), JUMPED, folder=RES, loads=False),
    "transcoder": Case(npz(JUMP), JUMPED, folder=TRANSCODER),
    "embedding": Case(
        npz(JUMP), lambda: above(X.double() @ W_ENC.double() / D**0.5 + B_ENC.double(), THRESHOLD.double()),
        lambda f: f @ W_DEC.double() * D**0.5 + B_DEC.double(),
        folder="gemma-scope-2b-pt-res/embedding/width_4k/average_l0_9",
    ),
    "2 res": Case(second(LOWER), JUMPED, folder="gemma-scope-2-270m-pt/resid_post/layer_2_width_16k_l0_small"),
    "2 transcoder": Case(
        second(LOWER, affine_connection=False), JUMPED, folder="gemma-scope-2-270m-pt/transcoder/layer_2_width_16k_l0_small"
    ),
}  # fmt: skip


# Llamascopium: https://github.com/OpenMOSS/Language-Model-SAEs, models/sae.py, lm_saes/sae.py of November 2024 ---------

INSIDE, OUTSIDE = D**0.5 / 9.0, D**0.5 / 5.0  # what activations are scaled by, of mean norms 9 and 5
OLD = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}
NEW = {"W_E": W_ENC, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
LOG = {"activation_function.log_jumprelu_threshold": THRESHOLD.log()}
NORMS = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(9.0)}
OUT_NORMS = NORMS | {f"dataset_average_activation_norm.{TARGET}": torch.tensor(5.0)}
HYPER: dict[str, Any] = {
    "hook_point_in": HOOK, "hook_point_out": HOOK, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": F // D, "d_model": D, "d_sae": F, "act_fn": "relu", "jump_relu_threshold": 0.0,
    "norm_activation": "inference", "dataset_average_activation_norm": None, "sparsity_include_decoder_norm": False,
    "use_glu_encoder": False, "top_k": K, "lp": 1,
}  # fmt: skip
SCALED = {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 9.0, "out": 9.0}}
CONFIG: dict[str, Any] = {
    "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True, "act_fn": "relu",
    "norm_activation": "inference", "sparsity_include_decoder_norm": False, "top_k": K, "use_triton_kernel": False,
    "jumprelu_threshold_window": 2.0, "hook_point_in": HOOK, "hook_point_out": HOOK, "use_glu_encoder": False,
}  # fmt: skip


def hyper(weights: str = "checkpoints/final.safetensors", wrap: bool = False, **cfg: Any) -> Callable[[Path], None]:
    return files("hyperparams.json", HYPER | cfg, weights, OLD, wrap)


def llamascopium(tensors: dict[str, Tensor], **cfg: Any) -> Callable[[Path], None]:
    return files("config.json", CONFIG | cfg, "sae_weights.safetensors", tensors)


def folded(center: bool = False) -> Tensor:
    """Pre-activations [N, F] as the loader of 2024 has them: mean norms and norms of decoder rows folded in."""
    x = X.double() - (B_DEC.double() / INSIDE if center else 0)
    return (x @ W_ENC.double() + B_ENC.double() / INSIDE) * NORM


OF_FOLDED: Callable[[Tensor], Tensor] = lambda f: (f / NORM) @ W_DEC.double() + B_DEC.double() / INSIDE
TO_TARGET: Callable[[Tensor], Tensor] = lambda f: (f * INSIDE @ W_DEC.double() + B_DEC.double()) / OUTSIDE
SCALED_PRE: Callable[[], Tensor] = lambda: pre(X * INSIDE, center=False)
LLAMASCOPIUM = {
    "2024": Case(hyper(), lambda: pre(center=False).relu()),
    "2024, centered": Case(hyper(apply_decoder_bias_to_pre_encoder=True), lambda: pre().relu()),
    "2024 jumprelu": Case(hyper(act_fn="jumprelu", jump_relu_threshold=2.0), lambda: above(pre(center=False), 2.0)),
    "2024 topk": Case(
        hyper("sae_weights.pt", True, act_fn="topk", sparsity_include_decoder_norm=True, **SCALED), lambda: top(folded()),
        OF_FOLDED,
    ),
    "2024 topk with a threshold": Case(
        hyper(act_fn="topk", jump_relu_threshold=2.0, sparsity_include_decoder_norm=True, **SCALED),
        lambda: above(folded(), 2.0), OF_FOLDED,
    ),
    "2024 jumprelu, scaled and centered": Case(
        hyper(
            act_fn="JumpReLU", jump_relu_threshold=2.0, sparsity_include_decoder_norm=True,
            apply_decoder_bias_to_pre_encoder=True, **SCALED
        ),
        lambda: above(folded(center=True), 2.0), OF_FOLDED,
    ),
    "2024 jumprelu, scaled": Case(
        hyper(act_fn="jumprelu", jump_relu_threshold=2.0, **SCALED), lambda: above(folded() / NORM, 2.0),
        lambda f: f @ W_DEC.double() + B_DEC.double() / INSIDE,
    ),
    "2025, one threshold": Case(
        llamascopium(OLD, act_fn="jumprelu", jump_relu_threshold=2.0), lambda: above(pre(center=False), 2.0)
    ),
    "2025 of nn.Linear": Case(
        llamascopium(OLD | {"log_jumprelu_threshold": THRESHOLD.log()}, act_fn="jumprelu"), JUMPED
    ),
    "2025, little said": Case(
        files(
            "config.json", {"d_model": D, "expansion_factor": F / D, "hook_point_in": HOOK}, "sae_weights.safetensors",
            NEW | NORMS,
        ),
        lambda: SCALED_PRE().relu() / INSIDE, lambda f: f @ W_DEC.double() + B_DEC.double() / INSIDE,
    ),
    "2025 jumprelu, little said": Case(
        files(
            "config.json", {"d_model": D, "expansion_factor": F / D, "hook_point_in": HOOK, "act_fn": "jumprelu"},
            "sae_weights.safetensors", NEW | NORMS | LOG,
        ),
        lambda: SCALED_PRE() * (SCALED_PRE() * NORM > THRESHOLD.double()) / INSIDE,
        lambda f: f @ W_DEC.double() + B_DEC.double() / INSIDE,
    ),
    "topk": Case(llamascopium(NEW, act_fn="topk"), lambda: top(pre(center=False))),
    "without b_dec": Case(
        llamascopium({n: NEW[n] for n in ("W_E", "b_E", "W_D")}, use_decoder_bias=False), lambda: pre(center=False).relu(),
        lambda f: f @ W_DEC.double(),
    ),
    "jumprelu that counts norms": Case(
        llamascopium(NEW | LOG, act_fn="jumprelu", sparsity_include_decoder_norm=True),
        lambda: pre(center=False) * (pre(center=False) * NORM > THRESHOLD.double()),
    ),
    "jumprelu transcoder of scaled activations that counts norms": Case(
        llamascopium(
            NEW | LOG | OUT_NORMS, act_fn="jumprelu", sparsity_include_decoder_norm=True, norm_activation="dataset-wise",
            hook_point_out=TARGET,
        ),
        lambda: SCALED_PRE() * (SCALED_PRE() * NORM > THRESHOLD.double()) / INSIDE, TO_TARGET,
    ),
    "topk transcoder of scaled activations that counts norms": Case(
        llamascopium(
            NEW | OUT_NORMS, act_fn="topk", sparsity_include_decoder_norm=True, norm_activation="dataset-wise",
            hook_point_out=TARGET,
        ),
        lambda: top(SCALED_PRE() * NORM) / OUTSIDE, lambda f: (f / NORM) @ W_DEC.double() + B_DEC.double() / OUTSIDE,
    ),
}  # fmt: skip

ALL = {
    f"{library}: {name}": case
    for library, cases in {
        "SAELens": SAELENS, "dictionary_learning": DICTIONARY_LEARNING, "sparsify": SPARSIFY, "Gemma Scope": GEMMA_SCOPE,
        "Llamascopium": LLAMASCOPIUM,
    }.items()
    for name, case in cases.items()
}  # fmt: skip
