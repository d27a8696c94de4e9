"""adam against torch's own optimiser, and adam_rows against a gradient written out in float64."""

import pytest
import torch
from temposae.kernels.adam import Moments, Rates, adam, adam_rows, row_norms
from temposae.kernels.code import SparseCode
from temposae.kernels.configs import CONFIGS


def rates(step=3, lr=0.01, factor=0.7, dtype=torch.float32):
    numbers = (lr / (1 - 0.9**step), (1 - 0.999**step) ** 0.5, factor)
    return Rates(*(torch.tensor(number, dtype=dtype) for number in numbers))


def moments(like, generator):
    return Moments(*(0.1 * torch.rand(like.shape, generator=generator).to(like.dtype) for _ in range(2)))


def test_adam_is_torch_adam(backend_name):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    theirs.requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=0.01)
    state, shadow = Moments(torch.zeros_like(ours), torch.zeros_like(ours)), torch.empty_like(ours, dtype=torch.float16)
    for step in range(1, 6):
        grad = torch.randn(7, 33, generator=generator)
        theirs.grad = 0.7 * grad
        optimiser.step()
        adam(ours, grad, state, rates(step), shadow=shadow, backend=backend_name)
    assert torch.allclose(ours, theirs.detach(), rtol=0, atol=1e-6)
    assert torch.allclose(state.exp_avg_sq, optimiser.state[theirs]["exp_avg_sq"], rtol=1e-5)
    assert torch.equal(shadow, ours.half())


@pytest.fixture(params=[False, True], ids=["free rows", "unit rows"])
def unit_norm(request):
    return request.param


def drawn(shape, unit_norm):
    generator = shape.generator
    W = torch.randn(shape.F, shape.D + 1, generator=generator)  # of one dimension, a unit row could not move
    if unit_norm:
        W /= W.norm(dim=1, keepdim=True)
    rows, center = torch.randn(shape.N, shape.D + 1, generator=generator), torch.randn(shape.D + 1, generator=generator)
    return W, rows, center, moments(W, generator)


def expected_gradient(acts, W, rows, center, unit_norm):
    grad = acts.T @ (rows.double() - center.double())
    if unit_norm:
        along = torch.einsum("fd,fd->f", grad, W.double())
        grad = grad - along[:, None] * W.double()
    return grad


def test_rows_move_as_their_gradient_says(shape, backend, make_code, dense, unit_norm, assert_close):
    code, (W, rows, center, state) = make_code(shape), drawn(shape, unit_norm)
    grad = 0.7 * expected_gradient(dense(code), W, rows, center, unit_norm)
    mean = 0.9 * state.exp_avg.double() + 0.1 * grad
    square = 0.999 * state.exp_avg_sq.double() + 0.001 * grad.square()
    moved = W.double() - 0.01 / (1 - 0.9**3) * mean / (square.sqrt() / (1 - 0.999**3) ** 0.5 + 1e-8)
    if unit_norm:
        moved = moved / moved.norm(dim=1, keepdim=True)
    before, shadow = W.clone(), torch.empty_like(W, dtype=torch.float16)
    norms = adam_rows(
        W, code.transpose(), code.values, rows, state, rates(), center=center, unit_norm=unit_norm, shadow=shadow,
        backend=backend,
    )  # fmt: skip
    assert_close(norms, (grad / 0.7).square().sum(1), name="norms")
    assert_close(state.exp_avg, mean, name="exp_avg")
    assert_close(state.exp_avg_sq, square, name="exp_avg_sq")
    assert_close(W, moved, name="W")
    assert_close(W - before, moved - before.double(), 1e-4, name="step")  # a small difference of large numbers
    assert torch.equal(shadow, W.half())


def test_norms_are_those_of_the_gradient(shape, backend, make_code, dense, unit_norm, assert_close):
    code, (W, rows, center, _) = make_code(shape), drawn(shape, unit_norm)
    norms = row_norms(code.transpose(), code.values, rows, center=center, W=W if unit_norm else None, backend=backend)
    assert_close(norms, expected_gradient(dense(code), W, rows, center, unit_norm).square().sum(1))


def test_entries_of_several_codes_over_stacked_rows(backend_name, assert_close):
    """Tokens beyond the rows begin again at the first, so two codes of N tokens share x [N, D]."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 5, (8, 3), generator=generator, dtype=torch.int32)
    code = SparseCode(torch.randn(8, 3, generator=generator), indices, 5)
    rows = torch.randn(4, 6, generator=generator)
    norms = row_norms(code.transpose(), code.values, rows, backend=backend_name)
    assert_close(norms, (code.to_dense().double().T @ rows.double().repeat(2, 1)).square().sum(1))


def test_same_bits_twice_with_a_latent_on_every_token(backend, make_code, shape, monkeypatch):
    for row in CONFIGS.values():
        monkeypatch.setitem(row, "windows", row["windows"] | dict(SPLIT=4))
    results = []
    for _ in range(2):
        code, (W, rows, _, state) = make_code(shape), drawn(shape, True)
        adam_rows(W, code.transpose(), code.values, rows, state, rates(), unit_norm=True, backend=backend)
        results.append((W, *state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(W=torch.ones(4, 4)), r"W must have shape \[F, D\] = \[4, 5\], got \[4, 4\]"),
        (dict(W=torch.ones(5, 4).T), "parameter must be contiguous"),
        (dict(values=torch.ones(3)), "values must have one element for each of 2 entries, got 3"),
        (dict(rows=torch.ones(2)), r"rows must have shape \[M, D\], got \[2\]"),
        (dict(center=torch.ones(4)), r"center must have shape \[D\] = \[5\], got \[4\]"),
        (dict(shadow=torch.ones(3, 5)), r"shadow must have the parameter's shape \[4, 5\], got \[3, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    code = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 4)
    arguments = dict(W=torch.ones(4, 5), values=code.values, rows=torch.ones(2, 5)) | change
    like = torch.ones_like(arguments["W"]).contiguous()
    with pytest.raises(ValueError, match=message):
        adam_rows(entries=code.transpose(), moments=Moments(like, like), rates=rates(), **arguments)
    with pytest.raises(ValueError, match="grad must have the parameter's shape"):
        adam(like, torch.ones(2), Moments(like, like), rates())
