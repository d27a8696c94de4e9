"""sparsify: cfg.json and sae.safetensors, from its first release (`Sae`, June 2024) to 1.3 (`SparseCoder`).

What a file does not say has its class' default there. A transcoder takes b_dec from nothing, as its loader has it now.
"""

from pathlib import Path

from ..errors import UserError
from .hook_metadata import Where, known, of_module
from .intermediate import DictionarySpec, State
from .json_settings import Settings, read_settings
from .tensor_files import TrackedTensors

_INSTEAD = "; other kinds work in sparsify alone"


def read(cfg: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    cfg.one_of("activation", cfg.get("activation", "topk"), ["topk"], _INSTEAD)
    for name in ("signed", "skip_connection"):
        if cfg.flag(name, False):
            raise UserError(f"{name}: true is not allowed; it must be false{_INSTEAD}")
    weights = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
    }  # fmt: skip
    if weights["W_enc"].ndim == 2:
        D, F = weights["W_enc"].shape
        latents = cfg.whole("num_latents", 0, least=0) or D * (cfg.whole("expansion_factor", 32) or 0)
        for name, stated_size, size in (("d_in", cfg.whole("d_in", D), D), ("num_latents", latents, F)):
            if stated_size != size:
                raise UserError(f"{name}: {stated_size} does not fit the weights, where it is {size}")
    is_transcoder = cfg.flag("transcode", False)
    return DictionarySpec(
        "topk", weights, not is_transcoder, is_transcoder, cfg.whole("k", 32), where=_place(folder, is_transcoder)
    )


def _place(folder: Path, is_transcoder: bool) -> Where:
    """The folder has the name of a module, and the run's settings are in the folder above it."""
    folder = folder.absolute()
    module = folder.parent if folder.name.startswith("seed") else folder
    file = module.parent / "config.json"
    run = read_settings(file, str(file)) if file.is_file() else Settings()
    if "ctx_len" not in run:  # the settings of something else
        run = Settings()
    place = of_module(module.name, is_transcoder)
    return place | known(model=run.text("model"), context=run.whole("ctx_len", least=2), data=run.text("dataset"))


def write(spec: DictionarySpec) -> tuple[dict[str, object], State]:
    if spec.activation != "topk":
        raise UserError(f"activation: {spec.activation} is not allowed; sparsify has topk alone")
    D, F, d_out = spec.sizes
    if d_out != D:
        raise UserError(f"d_out: {d_out} is not allowed; sparsify's transcoders give as many as they get ({D})")
    t = spec.subtracting(True).tensors
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = {
        "activation": "topk", "expansion_factor": max(1, F // D), "normalize_decoder": True, "num_latents": F, "k": spec.k,
        "multi_topk": False, "skip_connection": False, "transcode": spec.is_transcoder, "d_in": D,
    }  # fmt: skip
    return cfg, tensors
