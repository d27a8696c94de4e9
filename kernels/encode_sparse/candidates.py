"""The candidates of all tokens, from the kernel of `triton.py` or of `persistent.py`. `merge.py` selects among them."""

import torch
import triton
from torch import Tensor

from ..backend import has_wgmma, launch_kernel, launch_options
from ..encode.triton import Operands
from .triton import candidates_kernel


def is_persistent(launch: Operands) -> bool:
    """Return whether `persistent.py` computes the candidates: if the table says so, on sm_90, without a mask, for operands
    in 16 bits and in TMA's layouts."""
    may_be = launch.options["TMA"] and not launch.MASK and launch.x.element_size() == 2
    return bool(may_be and has_wgmma(launch.x.device) and launch_options("encode_topk_persistent", launch.x)["USE"])


class Candidates:
    """The candidates of all tokens."""

    def __init__(
        self, launch: Operands, keep: int, aux_keep: int = 0, aux_latents: Tensor | None = None,
        threshold: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None, dictionaries: int = 1,
    ):  # fmt: skip
        x, f = launch.x, launch.W_enc.shape[1]
        self.launch, self.n_latents, self.tile = launch, f, launch.options["BLOCK_F"]
        self.dictionaries, self.n_tokens = dictionaries, dictionaries * len(x)
        self.threshold, self.keep, self.aux_keep = threshold, keep, aux_keep
        self.aux_latents = None if aux_latents is None else aux_latents.view(torch.uint8).contiguous()
        self.tiles = triton.cdiv(f // dictionaries, self.tile)
        self.packed, self.aux_packed = (
            torch.empty((self.n_tokens, self.tiles * per_tile), dtype=torch.int32, device=x.device)
            for per_tile in (keep, aux_keep)
        )
        conditions = x if threshold is None else threshold, x if self.aux_latents is None else self.aux_latents
        flags = dict(
            HAS_THRESHOLD=threshold is not None, HAS_AUX_LATENTS=aux_latents is not None, EVEN_F=f % self.tile == 0,
            KEEP=keep, AUX_KEEP=aux_keep,
        )  # fmt: skip
        if is_persistent(launch):
            from .persistent import store_candidates

            store_candidates(launch, self.packed, self.aux_packed, *conditions, self.tiles, **flags)
            return
        launch_kernel(
            candidates_kernel, launch.grid,
            self.packed, self.aux_packed, *launch.tiled, *(scales or (x, x)), *conditions, *launch.numbers, self.tiles,
            SCALED=scales is not None, **flags, **launch.settings,
        )  # fmt: skip
