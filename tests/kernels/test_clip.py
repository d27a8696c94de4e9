"""clip against clip_grad_norm_, Adam's step on several parameters at once, and norms without reading unit rows."""

import pytest
import torch
from temposae.kernels.adam import Moments, Rates, adam, adam_each, row_norms
from temposae.kernels.clip import clip


@pytest.mark.parametrize("limit", [0.5, 1e4], ids=["clipped", "within the limit"])
def test_norm_and_factor_are_those_of_torch(shape, backend, assert_close, limit):
    """Of two dictionaries, each by itself."""
    draw, s = shape.generator, 2
    rows = torch.randn(s, shape.F, shape.D, generator=draw)
    grads = [torch.randn(s, size, generator=draw) for size in (shape.F, shape.D, 3, 40)]
    for count in (0, 1, 4):
        factor = torch.full((s,), torch.nan)
        norms = [rows.square().sum(2).flatten(), rows.square().sum(2)] if count else []
        norm = clip(norms, [grads[0].flatten(), *grads[1:count]], limit, factor, backend=backend)
        for i in range(s):
            parameters = [
                torch.zeros_like(each).double()
                for each in (rows[i], rows[i], grads[0][i], *(g[i] for g in grads[1:count]))
            ]
            values = (rows[i], rows[i], grads[0][i], *(g[i] for g in grads[1:count]))
            if not count:
                parameters, values = [torch.zeros_like(grads[0][i]).double()], [grads[0][i]]
            for parameter, grad in zip(parameters, values, strict=True):
                parameter.grad = grad.double()
            assert_close(norm[i], torch.nn.utils.clip_grad_norm_(parameters, limit))
            assert_close(factor[i] * values[-1], parameters[-1].grad)


def test_a_large_gradient_is_added_by_torch(monkeypatch, assert_close):
    pytest.importorskip("triton")
    monkeypatch.setattr("temposae.kernels.clip.triton.LARGEST", 10)
    grads, factor = [torch.randn(size) for size in (11, 3, 20)], torch.ones(1)
    norm = clip([torch.ones(2)], grads, 1.0, factor, backend="triton")
    assert_close(norm, (2 + torch.cat(grads).double().square().sum()).sqrt()[None])


def test_nan_is_not_hidden(backend_name):
    factor = torch.ones(1)
    norm = clip([], [torch.tensor([torch.nan, 1.0])], 1.0, factor, backend=backend_name)
    assert norm.isnan()
    assert factor.isnan()


def test_what_does_not_fit_is_named():
    factor, three = torch.ones(2), torch.ones(3)
    for norms, gradients in (([three], [torch.ones(2)]), ([], []), ([torch.ones(2)] * 3, [torch.ones(2)])):
        with pytest.raises(
            ValueError, match="needs up to two squared norms, and gradients, of 2 equal runs, got sizes"
        ):
            clip(norms, gradients, 1.0, factor)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parameters_together_are_each_as_by_itself(shape, backend, count):
    """The same bits. Two dictionaries with rates of their own; a third parameter is launched by itself."""
    draw, rates = shape.generator, Rates(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), torch.tensor([0.5, 2.0]))
    results = []
    parameters = [torch.randn(2, size, generator=draw) for size in (shape.F, shape.D, 5)][:count]
    grads = [torch.randn(parameter.shape, generator=draw) for parameter in parameters]
    for together in (True, False):
        weights = [parameter.clone() for parameter in parameters]
        moments = [Moments(torch.ones_like(w), torch.ones_like(w)) for w in weights]
        if together:
            adam_each(weights, grads, moments, rates, backend=backend)
        else:
            for arguments in zip(weights, grads, moments, strict=True):
                adam(*arguments, rates, backend=backend)
        results.append([*weights, *(moment for each in moments for moment in each[:2])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(results[0][0], parameters[0])


def test_a_gradient_of_another_shape_is_named():
    parameter, moments = torch.ones(3), Moments(torch.ones(3), torch.ones(3))
    rates = Rates(*torch.ones(3))
    with pytest.raises(ValueError, match=r"grad must have the parameter's shape \[3\], got \[4\]"):
        adam_each([parameter], [torch.ones(4)], [moments], rates)


def test_norms_across_unit_rows_without_reading_them(shape, backend, make_code, dense, assert_close):
    """`along` is each entry's part of the gradient's component along the row. Here W has another dimension, so that rows
    may move."""
    code, draw = make_code(shape), shape.generator
    W = torch.nn.functional.normalize(torch.randn(shape.F, shape.D + 1, generator=draw), dim=1)
    rows = torch.randn(shape.N, shape.D + 1, generator=draw)
    grad = dense(code).T @ rows.double()
    across = grad - (grad * W.double()).sum(1, keepdim=True) * W.double()
    projection = (rows.double() @ W.double().T)[code.rows.flatten(), code.live(code.indices).flatten().long()]
    along = (code.values.flatten() * projection).float()
    entries = code.transpose()
    norms = row_norms(entries, code.values, rows, along=along, backend=backend)
    assert_close(norms, across.square().sum(1), 1e-4)  # a difference of squares
    assert (norms >= 0).all()
    shared = {"along": along[entries.order]}
    assert torch.equal(norms, row_norms(entries, code.values, rows, along=along, shared=shared, backend=backend))
    with pytest.raises(ValueError, match="along must have"):
        row_norms(entries, code.values, rows, along=along[1:], backend=backend)
    with pytest.raises(ValueError, match="W must not be given"):
        row_norms(entries, code.values, rows, along=along, W=W, backend=backend)
