"""position_loss against sums written position by position in float64."""

import pytest
import torch
from temposae.kernels.loss import position_loss


def expected(residual, acts, pos, n_positions):
    at = [pos == t for t in range(n_positions)]
    return (
        torch.stack([m.sum() for m in at]),
        torch.stack([residual.double()[m].square().sum() for m in at]),
        torch.stack([acts[m].abs().sum() for m in at]),
        torch.stack([(acts[m] != 0).sum() for m in at]),
    )


def inputs(shape, dtype):
    residual = torch.randn(shape.N, shape.D, generator=shape.generator).to(dtype)
    return residual, torch.randint(0, shape.T, (shape.N,), generator=shape.generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_sparse(shape, backend, make_code, dense, assert_close, dtype):
    code, (residual, pos) = make_code(shape, dtype), inputs(shape, dtype)
    sums = position_loss(residual, code, pos, shape.T, backend=backend)
    for name, out, reference in zip(sums._fields, sums, expected(residual, dense(code), pos, shape.T), strict=True):
        assert out.dtype == torch.float32
        assert_close(out, reference, name=name)


def test_dense(shape, backend, assert_close):
    residual, pos = inputs(shape, torch.float32)
    acts = torch.randn(shape.N, shape.F, generator=shape.generator).relu()
    sums = position_loss(residual.T.contiguous().T, acts, pos.int(), shape.T, backend=backend)
    for name, out, reference in zip(sums._fields, sums, expected(residual, acts.double(), pos, shape.T), strict=True):
        assert_close(out, reference, name=name)


def test_squared_norms_instead_of_the_residual(shape, backend, make_code, assert_close):
    code, (residual, pos) = make_code(shape), inputs(shape, torch.float32)
    squared = residual.square().sum(1)
    for given, out in zip(
        position_loss(residual, code, pos, shape.T), position_loss(squared, code, pos, shape.T), strict=True
    ):
        assert_close(out, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=torch.ones(3, 4)), r"residual must have shape \[N, D\] or \[N\] with N = 2, got \[3, 4\]"),
        (dict(pos=torch.tensor([0, 5])), r"pos must lie in \[0, T\) = \[0, 5\), got values from 0 to 5"),
        (dict(pos=torch.tensor([0])), r"pos must have shape \[N\] = \[2\], got \[1\]"),
        (dict(values=torch.ones(2, 3).long()), "values must have a floating dtype"),
        (dict(n_positions=0), "n_positions must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(residual=torch.ones(2, 4), values=torch.ones(2, 3), pos=torch.tensor([0, 1]), n_positions=5)
    with pytest.raises(ValueError, match=message):
        position_loss(**(arguments | change))
