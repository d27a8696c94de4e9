"""Positions outside of [0, T) where nothing checks them: never read out of bounds, and in no sum. And masks as bits."""

import pytest
import torch
from temposae.kernels.code import SparseCode
from temposae.kernels.encoder_inputs import EncoderInputs
from temposae.kernels.loss import reference
from temposae.kernels.selection import Selection
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, D, F, T = 9, 12, 150, 5
FAR = torch.tensor([0, -1, 4, 5, 2, 10**9, -(10**9), 3, 1])


@pytest.fixture
def inputs():
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(T, F, generator=draw)

    def make(kind: str, pos: torch.Tensor) -> EncoderInputs:
        draw = torch.Generator().manual_seed(1)
        x, W_enc = torch.randn(N, D, generator=draw), torch.randn(F, D, generator=draw).T
        return EncoderInputs(x, W_enc, torch.zeros(F), None, mask > 0.5 if kind == "hard" else mask, pos)

    return make


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_kernels_read_the_nearest_row_of_a_mask(kind, dtype, inputs):
    pytest.importorskip("triton")
    from temposae.kernels.encode import triton as dense
    from temposae.kernels.encode_sparse import merge as sparse

    pos = FAR.to(dtype)
    far, near = inputs(kind, pos), inputs(kind, pos.clamp(0, T - 1))
    assert torch.equal(dense.encode(far), dense.encode(near))
    for across_batch in (False, True):
        selection = Selection(4, 0, None, across_batch, True, 1)
        (found, _), (expected, _) = (sparse.encode_topk(each, selection) for each in (far, near))
        assert torch.equal(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens_elsewhere_are_in_no_sum(ragged):
    draw = torch.Generator().manual_seed(0)
    residual, values = torch.randn(N, D, generator=draw), torch.randn(N, 3, generator=draw)
    indices = torch.arange(3, dtype=torch.int32).expand(N, 3).contiguous()
    inside = (FAR >= 0) & (FAR < T)

    def code(keep: torch.Tensor) -> SparseCode:
        if not ragged:
            return SparseCode(values[keep], indices[keep], F)
        return SparseCode(values[keep].flatten(), indices[keep].flatten(), F, 3 * torch.arange(int(keep.sum()) + 1))

    pytest.importorskip("triton")
    from temposae.kernels.loss import triton

    for module in (reference, triton):
        found = module.position_loss(residual, code(torch.ones(N, dtype=torch.bool)), FAR, T)
        expected = module.position_loss(residual[inside], code(inside), FAR[inside], T)
        assert found[0].tolist() == [1] * T
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("size", [(1, 1), (3, 31), (5, 32), (4, 33), (2, 64), (7, 1000)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_of_a_hard_mask(size, transposed):
    pytest.importorskip("triton")
    from temposae.kernels.encode.triton import hard

    mask = torch.rand(*size, generator=torch.Generator().manual_seed(0)) < 0.5
    if transposed:
        mask = mask.T.contiguous().T
    words, used = hard(mask, 128)
    t, f = size
    expected = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)])  # int64: one for each latent
    padded = torch.nn.functional.pad(mask, (0, -f % 32)).reshape(t, -1, 32)
    assert torch.equal(words, (padded * expected).sum(2).int())
    assert words.is_contiguous()
    assert used.shape == (t + 1, -(-f // 128))


def test_no_temporary_of_a_hard_mask_is_larger_than_the_mask():
    pytest.importorskip("triton")
    from temposae.kernels.encode.triton import hard

    mask = torch.rand(16, 4096, generator=torch.Generator().manual_seed(0)) < 0.5
    with LargestTensor() as largest:
        hard(mask, 128)
    assert 0 < largest.most <= mask.numel()
