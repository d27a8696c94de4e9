"""Launch configurations, one row per GPU generation (sm = 10 * major + minor). Data, not code: nothing is autotuned.

`temposae bench tune` times settings on the GPU at hand and writes its row. A row also serves GPUs between it and the next
(sm_86 and sm_89 take sm_80's, sm_120 takes sm_100's), and those have 99 KB of shared memory per block: no entry may need
more. `bench/aot.py` reports registers, spills and shared memory of all.

*_small is for float32, and encode's also for a D that is no multiple of the tile: pointers element by element, so smaller
tiles or registers spill. reconstruct holds up to BLOCK_K rows of a token at once; reconstruct_loop goes by them.
"""

CONFIGS: dict[int, dict[str, dict[str, int]]] = {}
CONFIGS[80] = {
    "encode": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=32, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_small": dict(BLOCK_N=128, BLOCK_F=64, BLOCK_D=16, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_topk": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=32, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_topk_small": dict(BLOCK_N=128, BLOCK_F=64, BLOCK_D=16, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_fp8": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, num_warps=8, num_stages=3),
    "merge": dict(BLOCK=2048, num_warps=4),
    "above_cut": dict(BLOCK_D=64, BLOCK_T=1024, BLOCK=2048, num_warps=4),
    "rescan": dict(BLOCK_D=64, BLOCK_T=1024, num_warps=4),
    "fold": dict(BLOCK_F=8, BLOCK_D=256, num_warps=4),
    "topk": dict(BLOCK_F=2048, num_warps=8),
    "threshold": dict(BLOCK_F=2048, num_warps=8),
    "decode": dict(BLOCK_K=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "reconstruct": dict(BLOCK_K=64, BLOCK_D=256, num_warps=8),
    "reconstruct_loop": dict(BLOCK_K=8, BLOCK_D=256, num_warps=4),
    "values_grad": dict(BLOCK_K=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "weight_grad": dict(BLOCK_E=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "windows": dict(SPLIT=256, BLOCK_E=8, BLOCK_D=256, STAGES=3, num_warps=4),
    "adam_rows": dict(BLOCK_E=2, STAGES=2, num_warps=8),
    "adam_rows_small": dict(BLOCK_E=1, STAGES=3, num_warps=8),
    "adam": dict(BLOCK=1024, num_warps=4),
    "adam_matrix": dict(num_warps=8),
    "token_loss": dict(BLOCK=1024, num_warps=4),
    "position_sum": dict(BLOCK_N=1024, num_warps=4),
}
CONFIGS[90] = CONFIGS[80] | {
    "encode": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_topk": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=64, GROUP_N=8, num_warps=8, num_stages=3),
    "encode_fp8": dict(BLOCK_N=128, BLOCK_F=128, BLOCK_D=128, GROUP_N=8, num_warps=8, num_stages=3),
}
CONFIGS[100] = CONFIGS[90] | {}
