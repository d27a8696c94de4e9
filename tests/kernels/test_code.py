"""SparseCode: its views, and that unused entries stay out of them."""

import pytest
import torch
from temposae.kernels.code import SparseCode


def offsets_of(code):
    k = code.values.shape[-1]
    return [k * n for n in range(code.n_tokens + 1)] if code.offsets is None else code.offsets.tolist()


def test_dense_rows_and_l0(shape, make_code, dense):
    code = make_code(shape)
    assert code.n_tokens == shape.N
    assert code.ragged == (code.offsets is not None)
    assert torch.equal(code.to_dense().double(), dense(code))
    assert torch.equal(code.l0(), (dense(code) != 0).sum(1))
    bounds = offsets_of(code)
    rows = [n for n in range(shape.N) for _ in range(bounds[n + 1] - bounds[n])]
    assert code.rows.flatten()[: len(rows)].tolist() == rows
    assert code.rows.shape == code.values.shape


@pytest.mark.parametrize("many", [0, 2**16], ids=["16-bit", "32-bit"])
def test_transpose_sorts_by_latent_then_token(shape, make_code, many):
    code = make_code(shape)
    code = SparseCode(code.values, code.indices, code.n_latents + many, code.offsets)
    order, latents, tokens, latent_offsets = code.transpose()
    bounds = offsets_of(code)
    entries = [(latent, e) for e, latent in enumerate(code.indices.flatten().tolist()[: bounds[-1]])]
    entries.sort()
    assert order[: len(entries)].tolist() == [e for _, e in entries]
    assert latents.tolist() == [j for j, _ in entries] + [code.n_latents] * (code.values.numel() - len(entries))
    assert tokens[: len(entries)].tolist() == code.rows.flatten()[order[: len(entries)]].tolist()
    assert sorted(order.tolist()) == list(range(code.values.numel()))
    assert latent_offsets.tolist() == [sum(j < f for j, _ in entries) for f in range(shape.F)] + [len(entries)] * (
        many + 1
    )


def test_layouts_are_computed_once_and_shared(shape, make_code):
    code = make_code(shape)
    assert code.with_values(2 * code.values).transpose() is code.transpose()


def test_to_dense_is_differentiable(make_code):
    code = SparseCode(torch.ones(3), torch.tensor([1, 0, 1], dtype=torch.int32), 2, torch.tensor([0, 1, 2]))
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: code.with_values(v).to_dense(), values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int32), 4),
            r"values \[2, 3\] and indices \[2, 2\] must match",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), 4), "indices must be int32, got torch.int64"),
        ((torch.ones(6), torch.ones(6, dtype=torch.int32), 4), r"values must be \[N, K\] without offsets"),
        ((torch.ones(6), torch.ones(6, dtype=torch.int32), 4, torch.ones(3)), r"offsets must be int64 \[N\+1\]"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseCode(*arguments)
