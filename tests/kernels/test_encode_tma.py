"""Tiles loaded through descriptors give the same bits as tiles loaded through pointers. Other layouts use pointers."""

import pytest
import torch
from temposae.kernels.configs import CONFIGS
from temposae.kernels.encode import encode
from temposae.kernels.encode_sparse import encode_threshold, encode_topk
from temposae.kernels.fp8 import Fp8Rows

from .conftest import SMALL_BLOCKS, Shape
from .test_encode_sparse import MASK_KINDS, inputs, mask_of

triton = pytest.importorskip("triton")
tiles = pytest.importorskip("temposae.kernels.encode.triton")
pytest.importorskip("triton.tools.tensor_descriptor")

SHAPE = Shape(N=19, D=72, F=301, K=9, T=5)  # no size is a multiple of a block, and rows of D are multiples of 16 bytes


@pytest.fixture(autouse=True)
def _triton_in_small_blocks(monkeypatch, poisoned):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")
    for entry, config in CONFIGS[80].items():
        monkeypatch.setitem(CONFIGS[80], entry, config | {k: v for k, v in SMALL_BLOCKS.items() if k in config})


@pytest.fixture
def both_paths(monkeypatch):
    """both_paths(call) -> its results through pointers and through descriptors, and the descriptors' shapes."""
    shapes: list[tuple[int, ...]] = []

    class Recorded(tiles.TensorDescriptor):
        def __post_init__(self):
            shapes.append((*self.shape, *self.block_shape))
            super().__post_init__()

    def run(call):
        results = []
        for tma in (0, 1):
            shapes.clear()
            for entry in ("encode", "encode_topk", "encode_fp8", "encode_small", "encode_topk_small"):
                monkeypatch.setitem(CONFIGS[80], entry, CONFIGS[80][entry] | dict(TMA=tma))
            results.append(call())
            assert tma or not shapes
        return *results, list(shapes)

    monkeypatch.setattr(tiles, "TensorDescriptor", Recorded)
    return run


def same(one, other):
    if one is None or other is None:
        return one is other
    pairs = [(one.values, other.values), (one.indices, other.indices)]
    if one.offsets is not None:
        pairs.append((one.offsets, other.offsets))
    return all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_activations(both_paths, dtype):
    x, W_enc, b_enc, center = inputs(SHAPE)
    x, W_enc = x.to(dtype), W_enc.to(dtype)
    pointers, descriptors, shapes = both_paths(lambda: encode(x, W_enc, b_enc, center=center))
    assert torch.equal(pointers, descriptors)
    assert shapes == [(SHAPE.N, SHAPE.D, 16, 32), (SHAPE.F, SHAPE.D, 32, 32)]


@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_both_codes(both_paths, mask_kind):
    (x, W_enc, b_enc, center), (mask, pos) = inputs(SHAPE), mask_of(mask_kind, SHAPE)
    aux_latents = torch.arange(SHAPE.F) % 3 == 0
    call = lambda: encode_topk(
        x, W_enc, b_enc, SHAPE.K, center=center, mask=mask, pos=pos, aux_k=5, aux_latents=aux_latents
    )
    pointers, descriptors, shapes = both_paths(call)
    assert same(pointers[0], descriptors[0])
    assert same(pointers[1], descriptors[1])
    assert len(shapes) == 2


@pytest.mark.slow
def test_ragged_codes(both_paths):
    x, W_enc, b_enc, center = inputs(SHAPE)
    threshold = torch.rand(SHAPE.F, generator=SHAPE.generator)
    for call in (
        lambda: encode_topk(x, W_enc, b_enc, SHAPE.K, center=center, across_batch=True)[0],
        lambda: encode_threshold(x, W_enc, b_enc, threshold, center=center, expected=SHAPE.K),
    ):
        pointers, descriptors, shapes = both_paths(call)
        assert same(pointers, descriptors)
        assert len(shapes) == 2


def test_products_in_fp8(both_paths):
    x, W_enc, b_enc, _ = inputs(SHAPE)
    encoder = Fp8Rows.of(W_enc.T)
    pointers, descriptors, shapes = both_paths(lambda: encode_topk(x, W_enc, b_enc, SHAPE.K, fp8=encoder)[0])
    assert same(pointers, descriptors)
    assert len(shapes) == 2


@pytest.mark.parametrize(
    "kind", ["rows of 8 bytes too many", "base not aligned", "latents last", "rows with gaps", "empty"]
)
def test_other_layouts_use_pointers(both_paths, kind):
    shape = SHAPE._replace(D=74) if kind == "rows of 8 bytes too many" else SHAPE
    x, W_enc, b_enc, _ = inputs(shape)
    if kind == "base not aligned":
        W_enc = torch.cat([torch.zeros(1), W_enc.T.flatten()])[1:].view(shape.F, shape.D).T
    elif kind == "latents last":
        W_enc = W_enc.contiguous()
    elif kind == "rows with gaps":
        x = torch.cat([x, x], 1)[:, : shape.D]
    elif kind == "empty":
        x = x[:0]
    pointers, descriptors, shapes = both_paths(lambda: encode_topk(x, W_enc, b_enc, shape.K)[0])
    assert same(pointers, descriptors)
    assert shapes == []
