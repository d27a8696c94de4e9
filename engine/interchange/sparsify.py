"""sparsify: cfg.json and sae.safetensors, from its first release (`Sae`, June 2024) to 1.3 (`SparseCoder`).

Missing settings have the defaults of its class. A transcoder does not subtract b_dec, as in its current loader.
"""

from pathlib import Path

from ..errors import UserError
from .hook_metadata import Where, known, of_module
from .intermediate import DictionarySpec, State, check_matrices
from .json_settings import Settings, check_size, read_settings
from .tensor_files import TrackedTensors

_INSTEAD = "; other kinds work only in sparsify"


def read(cfg: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    cfg.one_of("activation", cfg.get("activation", "topk"), ["topk"], _INSTEAD)
    for name in ("signed", "skip_connection"):
        if cfg.flag(name, False):
            raise UserError(f"{name}: true is not allowed; it must be false{_INSTEAD}")
    weights = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
    }  # fmt: skip
    check_matrices(weights)
    D, F = weights["W_enc"].shape
    check_size("d_in", cfg.whole("d_in"), D)
    check_size("num_latents", cfg.whole("num_latents", 0, least=0) or D * (cfg.whole("expansion_factor", 32) or 0), F)
    is_transcoder = cfg.flag("transcode", False)
    where = _place(folder, is_transcoder)
    return DictionarySpec("topk", weights, not is_transcoder, is_transcoder, cfg.whole("k", 32), where=where)


def _place(folder: Path, is_transcoder: bool) -> Where:
    """Return the place from the folder's name, which is a module's, and from the settings in the folder above."""
    folder = folder.absolute()
    module = folder.parent if folder.name.startswith("seed") else folder
    file = module.parent / "config.json"
    run = read_settings(file, str(file)) if file.is_file() else Settings()
    if "ctx_len" not in run:  # another program's settings
        run = Settings()
    place = of_module(module.name, is_transcoder)
    return place | known(model=run.text("model"), context=run.whole("ctx_len", least=2), data=run.text("dataset"))


def write(spec: DictionarySpec) -> tuple[dict[str, object], State]:
    if spec.activation != "topk":
        raise UserError(f"activation: {spec.activation} is not allowed; sparsify has only topk")
    D, F, d_out = spec.sizes
    if d_out != D:
        raise UserError(f"d_out: {d_out} is not allowed; in sparsify it must be d_in ({D})")
    t = spec.subtracting(True).tensors
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = {
        "activation": "topk", "expansion_factor": max(1, F // D), "normalize_decoder": True, "num_latents": F, "k": spec.k,
        "multi_topk": False, "skip_connection": False, "transcode": spec.is_transcoder, "d_in": D,
    }  # fmt: skip
    return cfg, tensors
