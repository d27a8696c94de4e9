"""All that depends on the GPU, by compute capability (sm = 10 * major + minor): dispatch rates, launch configurations.

Nothing is tuned at run time. No value has been measured on a GPU yet. `temposae bench tune` times launch settings on
the GPU at hand and writes its row of `CONFIGS`. A row also serves the GPUs up to the next one (sm_86 and sm_89 use
sm_80's, sm_120 uses sm_100's). Those have 99 KB of shared memory per block, so no entry may need more. `bench/aot.py`
reports registers, spills and shared memory.

Entries named *_small are for float32 and, for encode, also for a D that is not a multiple of BLOCK_D. Loads are then
element by element, and larger tiles would spill registers. With TMA=1, tiles of dense, aligned tensors are
loaded through descriptors. maxnreg limits the registers of a thread: at 128, two blocks of 8 warps share an SM.
encode_topk_persistent is for sm_90; USE=1 replaces encode_topk's kernel where encode_sparse/persistent.py can.
reconstruct keeps up to BLOCK_K rows of a token in registers, while reconstruct_loop reads them BLOCK_K at a time.
"""

from collections.abc import Mapping
from typing import NamedTuple


class DispatchRates(NamedTuple):
    """Rates at which cost models are evaluated to choose a backend. They are only compared with each other."""

    flops_per_s: Mapping[str, Mapping[int, float]]  # by backend and by bytes per element
    bytes_per_s: float  # device memory, both backends
    dense_from: float  # share of latents in use on a token, above which dense products are faster than gathers


# Other GPUs use the nearest entry. sm_90: estimates for an H100, cuBLAS against a Triton GEMM with IEEE float32.
# `dense_from` sets 5 products of 2 D F FLOP at 660 TFLOP/s against 4 gathers of 2 D bytes per latent in use at 5.5 TB/s.
DISPATCH_RATES = {
    90: DispatchRates(
        {"torch": {2: 660e12, 4: 50e12}, "triton": {2: 520e12, 4: 30e12}}, bytes_per_s=3.0e12, dense_from=1 / 96
    ),
}
FP8_SINCE = 89  # the first sm with e4m3 products

CONFIGS: dict[int, dict[str, dict[str, int]]] = {}
CONFIGS[80] = {
    "encode": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=32, GROUP_N=8, TMA=0, num_warps=8, num_stages=3, maxnreg=255),
    "encode_small": dict(BLOCK_N=128, BLOCK_F=64, BLOCK_D=16, GROUP_N=8, TMA=0, num_warps=8, num_stages=3),
    "encode_topk": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=32, GROUP_N=8, TMA=0, num_warps=8, num_stages=3, maxnreg=255),
    "encode_topk_small": dict(BLOCK_N=128, BLOCK_F=64, BLOCK_D=16, GROUP_N=8, TMA=0, num_warps=8, num_stages=3),
    "encode_topk_persistent": dict(USE=0, BLOCK_N=192, BLOCK_D=64, GROUP_N=8, STAGES=5, num_warps=4),
    "encode_fp8": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, TMA=0, num_warps=8, num_stages=3, maxnreg=255),
    "merge": dict(num_warps=1),
    "unsure": dict(BLOCK_T=1024, num_warps=4),
    "recompute": dict(BLOCK_N=64, BLOCK_D=32, num_warps=4, num_stages=4),
    "above_cut": dict(BLOCK=1024, num_warps=4),
    "rescan": dict(BLOCK_D=64, BLOCK_T=1024, num_warps=4),
    "fold": dict(BLOCK_F=8, BLOCK_D=256, num_warps=4),
    "topk": dict(BLOCK_F=2048, num_warps=8),
    "threshold": dict(BLOCK_F=2048, num_warps=8),
    "decode": dict(BLOCK_K=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "reconstruct": dict(BLOCK_K=64, BLOCK_D=256, num_warps=8),
    "reconstruct_loop": dict(BLOCK_K=8, BLOCK_D=256, num_warps=4),
    "values_grad": dict(BLOCK_K=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "pack": dict(BLOCK=1024, num_warps=4),
    "sorted": dict(BLOCK=512, num_warps=4),
    "windows": dict(SPLIT=256, num_warps=8),
    "weight_grad": dict(num_warps=8),
    "latent_sums": dict(BLOCK=64, num_warps=1),
    "adam_rows": dict(num_warps=8),
    "row_norms": dict(num_warps=8),
    "adam": dict(BLOCK=1024, num_warps=4),
    "adam_matrix": dict(num_warps=8),
    "clip": dict(BLOCK=8192, num_warps=32),
    "token_loss": dict(BLOCK=1024, num_warps=4),
    "entry_loss": dict(BLOCK=64, num_warps=1),
    "position_sum": dict(BLOCK_N=1024, num_warps=4),
    "count": dict(BLOCK=1024, num_warps=4),
}
CONFIGS[90] = CONFIGS[80] | {
    "encode": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, TMA=1, num_warps=8, num_stages=3, maxnreg=255),
    "encode_topk": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, TMA=1, num_warps=8, num_stages=3, maxnreg=128),
    "encode_fp8": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=128, GROUP_N=8, TMA=1, num_warps=8, num_stages=3, maxnreg=255),
}
CONFIGS[100] = CONFIGS[90] | {
    "encode_topk": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, TMA=1, num_warps=8, num_stages=3, maxnreg=255),
}
