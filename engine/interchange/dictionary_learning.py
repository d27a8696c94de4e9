"""dictionary_learning: config.json and ae.pt, from its first trainers (April 2024) to 0.1.

As its `encode` does by default, TopK keeps k latents per token and BatchTopK keeps those above its threshold. As in its
`from_pretrained`, decoder rows of an AutoEncoder are scaled to norm 1. Gated dictionaries become jumprelu.
"""

from pathlib import Path

import torch

from ..errors import UserError
from .hook_metadata import Where, after_layer, known, residual_layer
from .intermediate import DictionarySpec, State, check_matrices, gated, linear_weights, unit_rows
from .json_settings import Settings, check_size
from .tensor_files import TrackedTensors

_KINDS = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
_RENAMED = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}  # in January 2025
#: classes of dictionaries by trainer, for releases without `dict_class`
_CLASSES = {
    "StandardTrainer": "AutoEncoder", "PAnnealTrainer": "AutoEncoder", "StandardTrainerNew": "AutoEncoderNew",
    "GatedSAETrainer": "GatedAutoEncoder", "GatedAnnealTrainer": "GatedAutoEncoder", "TrainerTopK": "AutoEncoderTopK",
    "TopKTrainer": "AutoEncoderTopK",
}  # fmt: skip
#: trainers by class; SAEBench chooses its loader by the trainer
_TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer", "JumpReluAutoEncoder": "JumpReluTrainer",
}  # fmt: skip
_INSTEAD = "; other classes work only in dictionary_learning"


def read(config: Settings, tensors: TrackedTensors, _: Path) -> DictionarySpec:
    trainer = config.section("trainer")
    if not trainer:
        raise UserError("trainer: missing; it must have the settings of the trainer, including dict_class")
    kind = trainer.get("dict_class") or _CLASSES.get(str(trainer.get("trainer_class")))
    if kind is None:
        raise UserError("trainer.dict_class: missing; it must name the class of the dictionary")
    kind = trainer.one_of("trainer.dict_class", _RENAMED.get(str(kind), kind), list(_KINDS), _INSTEAD)
    activation = _KINDS[kind]
    weights = _weights(kind, tensors)
    check_matrices(weights)
    for name, size in zip(("activation_dim", "dict_size"), weights["W_enc"].shape, strict=True):
        check_size(f"trainer.{name}", trainer.whole(name), size)
    k, prefixes = None, None
    if activation in ("topk", "batchtopk"):
        k_tensor = tensors.take("k")
        if k_tensor is not None and (k_tensor.numel() != 1 or k_tensor.is_floating_point()):
            raise UserError("k: it must be one whole number beside the weights")
        k = int(k_tensor) if k_tensor is not None else trainer.whole("k")
        if k is None:
            raise KeyError("k")
        threshold = tensors.take("threshold")
        if activation == "batchtopk" and threshold is None:
            raise UserError(
                f"{kind} of before December 2024 has no threshold, so its latents depend on the batch; add the tensor "
                "threshold to ae.pt, or train it again"
            )
        weights |= {"threshold": threshold} if threshold is not None and activation == "batchtopk" else {}
    if kind == "MatryoshkaBatchTopKSAE":
        sizes = tensors["group_sizes"]
        if sizes.ndim != 1 or sizes.is_floating_point() or bool((sizes <= 0).any()):
            raise UserError("group_sizes: it must contain numbers of latents")
        prefixes = tuple(sizes.cumsum(0).tolist())
    subtracts = kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    context = config.section("buffer").whole("ctx_len", least=2)
    where = _place(trainer) | known(model=trainer.text("lm_name"), context=context)
    return DictionarySpec(activation, weights, subtracts, k=k, prefixes=prefixes, where=where)


def _weights(kind: str, tensors: TrackedTensors) -> State:
    if kind == "GatedAutoEncoder":
        weights = gated(tensors["encoder.weight"].T, *(tensors[name] for name in ("gate_bias", "mag_bias", "r_mag")))
        return weights | {"W_dec": tensors["decoder.weight"].T, "b_dec": tensors["decoder_bias"]}
    if "encoder.weight" not in tensors:
        names = ("W_enc", "b_enc", "W_dec", "b_dec", *(("threshold",) if kind == "JumpReluAutoEncoder" else ()))
        return {name: tensors[name] for name in names}
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
    weights = linear_weights(tensors) | {"b_dec": tensors[bias]}
    if kind == "AutoEncoder" and weights["W_dec"].ndim == 2:
        norms = weights["W_dec"].norm(dim=1)
        weights = weights if torch.allclose(norms, torch.ones_like(norms)) else unit_rows(weights)
    return weights


def _place(trainer: Settings) -> Where:
    submodule, layer = trainer.text("submodule_name") or "", trainer.whole("layer", least=0)
    if submodule.startswith("blocks."):  # we write the hook if the library has no name for it
        return {"hook": submodule}
    return {"hook": after_layer(layer)} if submodule.startswith("resid_post") and layer is not None else {}


def write(spec: DictionarySpec) -> tuple[dict[str, object], State]:
    if spec.is_transcoder:
        raise UserError("d_out: not allowed; dictionary_learning has no transcoders")
    kinds = {_KINDS[kind]: kind for kind in reversed(_TRAINERS)}
    kind = "MatryoshkaBatchTopKSAE" if spec.prefixes and spec.activation == "batchtopk" else kinds[spec.activation]
    spec = spec.subtracting(kind != "JumpReluAutoEncoder")
    t = spec.tensors
    tensors = dict(t)
    if kind in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        bias = "bias" if kind == "AutoEncoder" else "b_dec"
        weights = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T}
        tensors = {**weights, "encoder.bias": t["b_enc"], bias: t["b_dec"]}
    D, F, _ = spec.sizes
    if spec.k is not None:
        tensors["k"] = torch.tensor(spec.k, dtype=torch.int32)
        tensors["threshold"] = t.get("threshold", torch.tensor(-1.0))  # -1 stands for none
    if kind == "MatryoshkaBatchTopKSAE" and spec.prefixes:
        tensors["group_sizes"] = torch.tensor(spec.prefixes).diff(prepend=torch.zeros(1, dtype=torch.int64))
    # readers take `layer` for the residual stream after that layer, so other places have none
    layer = residual_layer(spec.where.get("hook"))
    trainer = {
        "trainer_class": _TRAINERS[kind], "dict_class": kind, "activation_dim": D, "dict_size": F, "k": spec.k,
        "device": "cpu", "lm_name": spec.where.get("model"), "layer": layer,
        "submodule_name": spec.where.get("hook") if layer is None else f"resid_post_layer_{layer}",
    }  # fmt: skip
    if spec.k is None:
        del trainer["k"]
    buffer = {"d_submodule": D, "io": "out"} | known(ctx_len=spec.where.get("context"))
    return {"trainer": trainer, "buffer": buffer}, tensors
