"""decode and its gradient in the values against dense products in float64."""

import pytest
import torch
from temposae.kernels.code import SparseCode
from temposae.kernels.decode import decode, decode_values_grad, reconstruct

LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def inputs(shape, dtype=torch.float32):
    generator = shape.generator
    W_dec = torch.randn(shape.F, shape.D, generator=generator).to(dtype)
    target = torch.randn(shape.N, shape.D, generator=generator).to(dtype)
    return W_dec, torch.randn(shape.D, generator=generator), target


@DTYPES
def test_reconstruction_and_residual(shape, backend, make_code, dense, assert_close, dtype):
    code, (W_dec, b_dec, target) = make_code(shape, dtype), inputs(shape, dtype)
    x_hat = dense(code) @ W_dec.double() + b_dec.double()
    out = decode(code, W_dec, b_dec, backend=backend)
    assert out.dtype == dtype
    assert_close(out, x_hat, LIMIT[dtype])
    residual = decode(code, W_dec, b_dec, target=target, backend=backend)
    assert_close(residual, target.double() - x_hat, LIMIT[dtype])


def test_any_strides(shape, backend, make_code, dense, assert_close):
    code, (W_dec, b_dec, target) = make_code(shape), inputs(shape)
    out = decode(code, W_dec.T.contiguous().T, b_dec, target=target.repeat_interleave(2, 1)[:, ::2], backend=backend)
    assert_close(out, target.double() - dense(code) @ W_dec.double() - b_dec.double())


@pytest.mark.random_shapes(50)
@DTYPES
def test_values_grad(shape, backend, make_code, assert_close, dtype):
    code, (W_dec, _, grad) = make_code(shape, dtype), inputs(shape, dtype)
    out = decode_values_grad(code, W_dec, grad, backend=backend)
    used = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    expected = (grad.double() @ W_dec.double().T)[code.rows.flatten()[:used], code.indices.flatten()[:used].long()]
    assert out.dtype == dtype
    assert_close(out.flatten()[:used], expected, LIMIT[dtype])
    assert (out.flatten()[used:] == 0).all()


@DTYPES
def test_reconstruct_is_decode_and_its_gradient(shape, backend, make_code, dense, assert_close, dtype):
    code, (W_dec, b_dec, target) = make_code(shape), inputs(shape, dtype)
    found = reconstruct(code, W_dec, b_dec, target.T.contiguous().T, backend=backend)
    residual = target.double() - dense(code) @ W_dec.double() - b_dec.double()
    used = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    where = code.rows.flatten()[:used], code.indices.flatten()[:used].long()
    assert found.residual.dtype == dtype
    assert_close(found.residual, residual, LIMIT[dtype], "residual")
    assert_close(found.squared_error, residual.square().sum(1), name="squared error")
    assert found.projection.shape == code.values.shape
    projection = found.projection.flatten()
    assert_close(projection[:used], (residual @ W_dec.double().T)[where], name="projection")
    assert (projection[used:] == 0).all()


def test_runs_of_tokens_with_a_bias_each_and_targets_in_common(shape, backend, make_code, dense, assert_close):
    """Two dictionaries, one token after another as the first sees it, then as the second does."""
    W_dec, _, target = inputs(shape)
    code, b_dec = make_code(shape._replace(N=2 * shape.N)), torch.randn(2, shape.D, generator=shape.generator)
    x_hat = dense(code) @ W_dec.double() + b_dec.double().repeat_interleave(shape.N, 0)
    residual = target.double().repeat(2, 1) - x_hat
    assert_close(decode(code, W_dec, b_dec, backend=backend), x_hat)
    assert_close(decode(code, W_dec, b_dec, target=target, backend=backend), residual)
    found = reconstruct(code, W_dec, b_dec, target, backend=backend)
    assert_close(found.residual, residual)
    assert_close(found.squared_error, residual.square().sum(1))


def test_a_token_without_entries_decodes_to_the_bias(backend_name):
    code = SparseCode(torch.ones(0), torch.ones(0, dtype=torch.int32), 4, torch.zeros(3, dtype=torch.int64))
    out = decode(code, torch.randn(4, 5), torch.arange(5.0), backend=backend_name)
    assert out.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_latent_named_twice_adds_up(backend_name):
    code = SparseCode(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]], dtype=torch.int32), 4)
    W_dec = torch.randn(4, 5)
    assert torch.allclose(decode(code, W_dec, torch.zeros(5), backend=backend_name), 3 * W_dec[3:])


def test_the_reference_is_differentiable():
    code = SparseCode(torch.randn(3, 2).double(), torch.tensor([[0, 2], [1, 2], [0, 3]], dtype=torch.int32), 4)

    def run(values, W_dec, b_dec, target):
        return decode(code.with_values(values), W_dec, b_dec, target=target)

    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(3, 2), (4, 5), (5,), (3, 5)]]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(W_dec=torch.ones(3, 5)), r"W_dec must have shape \[F, D\] with F = 4, got \[3, 5\]"),
        (dict(b_dec=torch.ones(4)), r"b_dec must have shape \[D\] = \[5\], got \[4\]"),
        (dict(b_dec=torch.ones(2, 4)), r"b_dec must have shape \[S, D\] = \[2, 5\], got \[2, 4\]"),
        (dict(b_dec=torch.ones(3, 5)), r"b_dec must have shape \[D\] = \[5\], got \[3, 5\]"),
        (dict(target=torch.ones(1, 4)), r"target must have shape \[M, D\] = \[1, 5\], got \[1, 4\]"),
        (dict(target=torch.ones(3, 5)), r"target must have shape \[N, D\] = \[2, 5\], got \[3, 5\]"),
        (dict(target=torch.ones(2, 5, dtype=torch.int32)), "target must have a floating dtype"),
        (dict(target=torch.ones(2, 5, device="meta")), "one device"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    code = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 4)
    arguments = dict(code=code, W_dec=torch.ones(4, 5), b_dec=torch.ones(5)) | change
    with pytest.raises(ValueError, match=message):
        decode(**arguments)
    with pytest.raises(ValueError, match=r"grad must have shape \[N, D\] = \[2, 5\]"):
        decode_values_grad(code, torch.ones(4, 5), torch.ones(2, 4))
