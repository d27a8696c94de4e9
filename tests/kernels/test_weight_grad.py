"""weight_grad against a dense product in float64."""

import pytest
import torch
from temposae.kernels.adam import row_norms
from temposae.kernels.code import SparseCode
from temposae.kernels.weight_grad import sort_entries, weight_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_sums_over_tokens(shape, backend, make_code, dense, assert_close, dtype):
    code = make_code(shape, dtype)
    values = torch.randn(code.values.shape, generator=shape.generator).to(dtype)
    rows = torch.randn(shape.N, shape.D, generator=shape.generator).to(dtype)
    out = weight_grad(code.transpose(), values, rows, backend=backend)
    assert out.dtype == torch.float32
    assert_close(out, dense(code, values).T @ rows.double())  # even for fp16, which is summed and returned in fp32


def test_any_strides_and_centred(shape, backend, make_code, dense, assert_close):
    code = make_code(shape)
    rows = torch.randn(shape.D, shape.N, generator=shape.generator).T
    center = torch.randn(shape.D, generator=shape.generator)
    out = weight_grad(code.transpose(), code.values, rows, center=center, backend=backend)
    assert_close(out, dense(code).T @ (rows.double() - center.double()))


def test_runs_of_latents_with_a_centre_each(shape, backend, make_code, dense, assert_close):
    code, rows = make_code(shape._replace(F=2 * shape.F)), torch.randn(shape.N, shape.D, generator=shape.generator)
    center = torch.randn(2, shape.D, generator=shape.generator)
    out = weight_grad(code.transpose(), code.values, rows, center=center, backend=backend)
    of_each = (dense(code)[:, nth].T @ (rows.double() - one) for nth, one in zip(halves(shape.F), center, strict=True))
    assert_close(out, torch.cat(list(of_each)))


def halves(f):
    return slice(0, f), slice(f, 2 * f)


def test_the_reference_is_differentiable():
    code = SparseCode(torch.randn(3, 2).double(), torch.tensor([[0, 2], [1, 2], [0, 3]], dtype=torch.int32), 5)
    leaves = [torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda values, rows: weight_grad(code.transpose(), values, rows), leaves)


@pytest.mark.parametrize(
    ("values", "rows", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 5), "values must have one element for each of 2 entries, got 4"),
        (torch.ones(2, 1), torch.ones(5), r"rows must have shape \[M, D\], got \[5\]"),
        (torch.ones(2, 1), torch.ones(2, 5).int(), "rows must have a floating dtype"),
    ],
)
def test_what_does_not_fit_is_named(values, rows, message):
    code = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=message):
        weight_grad(code.transpose(), values, rows)


@pytest.mark.parametrize("has_tokens", [True, False])
def test_entries_are_sorted_with_their_weights(shape, backend, make_code, has_tokens):
    """As `transpose` sorts them. What the passes over them read has the same bits as if each pass packed it."""
    code = make_code(shape)
    latents = code.live(code.indices, unused=code.n_latents).flatten()
    tokens = code.rows.flatten() if has_tokens or code.ragged else code.values.shape[1]
    encoder, decoder, along = torch.randn(3, *code.values.shape, generator=shape.generator)
    rows = torch.randn(shape.N, shape.D, generator=shape.generator)
    entries, *shared = sort_entries(
        latents, tokens, code.n_latents, encoder, decoder, along, (shape.N, shape.N), backend=backend
    )
    for name, found in entries._asdict().items():
        assert torch.equal(found, getattr(code.transpose(), name)), name
    for weights, each in zip((encoder, decoder), shared, strict=True):
        packed = row_norms(entries, weights, rows, shared=each, backend=backend)
        assert torch.equal(packed, row_norms(code.transpose(), weights, rows, backend=backend))
    if "triton" in backend:
        assert torch.equal(shared[1]["along"], along.flatten()[entries.order])
    with pytest.raises(ValueError, match="along must have one element for each"):
        sort_entries(latents, tokens, code.n_latents, encoder, decoder, along.flatten()[1:], (1, 1), backend=backend)


@pytest.mark.parametrize("d", [8, 22])
def test_columns_in_pairs_give_the_same_bits(monkeypatch, assert_close, d):
    """With windows: the first latent has most entries."""
    pytest.importorskip("triton")
    from temposae.kernels.weight_grad import triton as kernels

    monkeypatch.setattr(kernels, "PAIRED_FROM", 2)
    draw, n, f = torch.Generator().manual_seed(0), 600, 5
    indices = torch.stack([torch.zeros(n), torch.randint(1, f, (n,), generator=draw)], 1).int()
    code = SparseCode(torch.randn(n, 2, generator=draw), indices, f)
    rows = torch.randn(n, d + 1, generator=draw).bfloat16()
    layouts = {"paired": rows[:, :d].contiguous(), "odd stride": rows[:, :d], "odd address": rows.flatten()[1:]}
    layouts["odd address"] = layouts["odd address"][: d * (n - 1)].view(-1, d)
    for name, each in layouts.items():
        entries, values = code.transpose(), code.values
        _, _, constants = kernels.gather_arguments(entries, values, each, None)
        assert constants["PAIRED"] == (name == "paired"), name
    center, W = torch.randn(d, generator=draw), torch.nn.functional.normalize(torch.randn(f, d, generator=draw))
    for settings in (dict(), dict(center=center)):
        paired, single = (
            weight_grad(code.transpose(), code.values, layouts[name], backend="triton", **settings)
            for name in ("paired", "odd stride")
        )
        assert torch.equal(paired, single)
        exact = layouts["paired"].double() - settings.get("center", torch.zeros(d)).double()
        assert_close(paired, code.to_dense().double().T @ exact)
    paired, single = (
        row_norms(code.transpose(), code.values, layouts[name], W=W, backend="triton")
        for name in ("paired", "odd stride")
    )
    assert torch.equal(paired, single)
