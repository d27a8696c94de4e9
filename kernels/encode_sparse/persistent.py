"""candidates as a persistent, warp-specialised kernel for sm_90, in Gluon. The results have the bits of `triton.py`'s.

One program per multiprocessor goes through many tiles. A producer warp keeps a ring of STAGES buffers full through TMA.
Two groups of 4 warps take the tiles in turn: while one selects candidates, the other has the tensor cores. Triton's
interpreter cannot run Gluon.

Barriers have two phases, so a group must not wait for a step of the ring before the step before it was loaded: it would take
an older phase for its own. So a group waits for its turn, which the other one passes on after the last step of a tile.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..backend import launch_kernel, launch_options
from ..encode.triton import Operands, tile_of
from .triton import above_threshold, only_aux, rank_keys, store_largest

ROWS: gl.constexpr = gl.constexpr(64)  # of x in a matrix instruction; a tile has BLOCK_N / ROWS such blocks
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)  # per thread; also those of the kernel's own warps
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """Return the next stage of the ring, and its phase: the parity of the number of times that the ring was gone through."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def load_tiles(
    x_desc, w_desc, x_ring, w_ring, filled, released, N, D, F,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load x [BLOCK_N, BLOCK_D] and W_enc [BLOCK_F, BLOCK_D] of all steps of all tiles of this program, in order."""
    blocks: gl.constexpr = BLOCK_N // ROWS
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), gl.cdiv(N, BLOCK_N) * gl.cdiv(F, BLOCK_F), gl.num_programs(0)):
        tile_n, tile_f = tile_of(tile, N, F, BLOCK_N, BLOCK_F, GROUP_N)
        for start in range(0, D, BLOCK_D):
            mbarrier.wait(released.index(stage), phase ^ 1)
            full = filled.index(stage)
            mbarrier.expect(full, (BLOCK_N + BLOCK_F) * BLOCK_D * 2)
            for block in gl.static_range(blocks):
                rows = x_ring.index(stage * blocks + block)
                tma.async_copy_global_to_shared(x_desc, [tile_n * BLOCK_N + block * ROWS, start], full, rows)
            tma.async_copy_global_to_shared(w_desc, [tile_f * BLOCK_F, start], full, w_ring.index(stage))
            stage, phase = following(stage, phase, STAGES)


@gluon.jit
def store_block(
    acts, tokens, cols, tile_f, candidates_ptr, aux_candidates_ptr, threshold_ptr, aux_latents_ptr, N, F, TILES,
    HAS_THRESHOLD: gl.constexpr, HAS_AUX_LATENTS: gl.constexpr, EVEN_F: gl.constexpr, KEEP: gl.constexpr,
    AUX_KEEP: gl.constexpr, BLOCK_F: gl.constexpr,
):  # fmt: skip
    """Store the candidates of acts [ROWS, BLOCK_F]."""
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    keys = rank_keys(acts, cols - tile_f * BLOCK_F, cols, F, BLOCK_F, EVEN_F)
    # [ROWS] index of each token's slot for this tile
    first = (tokens.to(gl.int64) + tile_f // TILES * N) * TILES + tile_f % TILES
    store_largest(keys, candidates_ptr + first * KEEP, tokens < N, KEEP, EVEN_F)
    if AUX_KEEP > 0:
        if HAS_AUX_LATENTS:
            keys = only_aux(keys, aux_latents_ptr, cols, F)
        store_largest(keys, aux_candidates_ptr + first * AUX_KEEP, tokens < N, AUX_KEEP, EVEN_F)


@gluon.jit
def select_tiles(
    group, candidates_ptr, aux_candidates_ptr, b_ptr, threshold_ptr, aux_latents_ptr,
    x_ring, w_ring, filled, released, turns, N, D, F, TILES,
    HAS_THRESHOLD: gl.constexpr, HAS_AUX_LATENTS: gl.constexpr, EVEN_F: gl.constexpr, KEEP: gl.constexpr,
    AUX_KEEP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute every other tile of this program, from its `group`-th on, and store the candidates."""
    gl.static_assert(BLOCK_N == 3 * ROWS)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_F, 16]
    )
    steps = gl.cdiv(D, BLOCK_D)
    first = gl.program_id(0) + group * gl.num_programs(0)
    position = group * steps  # in the sequence of all steps of this program
    turn = 1 - group  # phase; the first turn of group 0 needs no other
    for tile in range(first, gl.cdiv(N, BLOCK_N) * gl.cdiv(F, BLOCK_F), 2 * gl.num_programs(0)):
        tile_n, tile_f = tile_of(tile, N, F, BLOCK_N, BLOCK_F, GROUP_N)
        cols = tile_f * BLOCK_F + gl.arange(0, BLOCK_F, gl.SliceLayout(0, layout))
        bias = gl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
        # three blocks [ROWS, BLOCK_F] of b + x @ W_enc, over D in steps of BLOCK_D
        zeros = gl.full([ROWS, BLOCK_F], 0.0, gl.float32, layout)
        top, middle, bottom = zeros + bias, zeros + bias, zeros + bias
        stage, phase = position % STAGES, position // STAGES % 2
        before = stage
        mbarrier.wait(turns.index(group), turn)
        for step in range(0, steps):
            mbarrier.wait(filled.index(stage), phase)
            w = w_ring.index(stage).permute((1, 0))
            top = warpgroup_mma(x_ring.index(3 * stage), w, top, is_async=True)
            middle = warpgroup_mma(x_ring.index(3 * stage + 1), w, middle, is_async=True)
            bottom = warpgroup_mma(x_ring.index(3 * stage + 2), w, bottom, is_async=True)
            # The products of the step before are done: its buffers may be filled again.
            top, middle, bottom = warpgroup_mma_wait(3, deps=(top, middle, bottom))
            mbarrier.arrive(released.index(before), count=1, pred=step > 0)
            before = stage
            stage, phase = following(stage, phase, STAGES)
        mbarrier.arrive(turns.index(1 - group), count=1)
        turn ^= 1
        top, middle, bottom = warpgroup_mma_wait(0, deps=(top, middle, bottom))
        mbarrier.arrive(released.index(before), count=1)
        position += 2 * steps
        for block in gl.static_range(3):
            acts = top if block == 0 else middle if block == 1 else bottom
            tokens = tile_n * BLOCK_N + block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            store_block(
                acts, tokens, cols, tile_f, candidates_ptr, aux_candidates_ptr, threshold_ptr, aux_latents_ptr,
                N, F, TILES, HAS_THRESHOLD, HAS_AUX_LATENTS, EVEN_F, KEEP, AUX_KEEP, BLOCK_F,
            )  # fmt: skip


@gluon.jit
def persistent_candidates_kernel(
    candidates_ptr, aux_candidates_ptr, x_ptr, w_ptr, b_ptr, threshold_ptr, aux_latents_ptr,
    N, D, F, TILES,
    HAS_THRESHOLD: gl.constexpr, HAS_AUX_LATENTS: gl.constexpr, EVEN_F: gl.constexpr, KEEP: gl.constexpr,
    AUX_KEEP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Candidates as in `candidates_kernel`. x_ptr and w_ptr are descriptors of blocks [ROWS, BLOCK_D] and
    [BLOCK_F, BLOCK_D] in 16 bits."""
    blocks: gl.constexpr = BLOCK_N // ROWS
    x_ring = gl.allocate_shared_memory(x_ptr.dtype, [STAGES * blocks, ROWS, BLOCK_D], x_ptr.layout)
    w_ring = gl.allocate_shared_memory(w_ptr.dtype, [STAGES, BLOCK_F, BLOCK_D], w_ptr.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    released = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(released.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (select_tiles, (
                0, candidates_ptr, aux_candidates_ptr, b_ptr, threshold_ptr, aux_latents_ptr,
                x_ring, w_ring, filled, released, turns, N, D, F, TILES,
                HAS_THRESHOLD, HAS_AUX_LATENTS, EVEN_F, KEEP, AUX_KEEP, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N, STAGES,
            )),
            (select_tiles, (
                1, candidates_ptr, aux_candidates_ptr, b_ptr, threshold_ptr, aux_latents_ptr,
                x_ring, w_ring, filled, released, turns, N, D, F, TILES,
                HAS_THRESHOLD, HAS_AUX_LATENTS, EVEN_F, KEEP, AUX_KEEP, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N, STAGES,
            )),
            (load_tiles, (
                x_ptr, w_ptr, x_ring, w_ring, filled, released, N, D, F, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N, STAGES,
            )),
        ],
        [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def store_candidates(
    launch: Operands,
    packed: Tensor,
    aux_packed: Tensor,
    threshold: Tensor,
    aux_latents: Tensor,
    tiles: int,
    **flags: int,
) -> None:
    """Launch the kernel with one program per multiprocessor."""
    x, rows_of_w, options = launch.x, launch.W_enc.T, launch_options("encode_topk_persistent", launch.x)
    del options["USE"]
    (n, d), f, block_f = x.shape, len(rows_of_w), launch.options["BLOCK_F"]
    all_tiles = triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(f, block_f)
    programs = min(all_tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    blocks = (x, [ROWS.value, options["BLOCK_D"]]), (rows_of_w, [block_f, options["BLOCK_D"]])
    descriptors = (TensorDescriptor.from_tensor(rows, block, layout_of(block)) for rows, block in blocks)
    launch_kernel(
        persistent_candidates_kernel, (programs,),
        packed, aux_packed, *descriptors, launch.bias, threshold, aux_latents, n, d, f, tiles,
        BLOCK_F=block_f, **flags, **options,
    )  # fmt: skip


def layout_of(block: list[int]) -> Any:
    """Return the layout in shared memory of a block in 16 bits."""
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
