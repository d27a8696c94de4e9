"""encode against its formula in float64."""

import pytest
import torch
from temposae.kernels.encode import encode

LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3}


def inputs(shape, dtype, layout="latent-major", mask_dtype=torch.bool):
    n, d, f, _, t = shape
    generator = shape.generator
    x = (3 * torch.randn(n, d, generator=generator) + 1).to(dtype)
    W_enc = (torch.randn(d, f, generator=generator) / d**0.5).to(dtype)
    W_enc = W_enc.T.contiguous().T if layout == "latent-major" else W_enc.repeat(1, 2)[:, ::2]
    b_enc, center = torch.randn(f, generator=generator), torch.randn(d, generator=generator)
    mask = torch.rand(t, f, generator=generator)
    mask = mask < 0.7 if mask_dtype == torch.bool else mask
    return x, W_enc, b_enc, center, mask, torch.randint(0, t, (n,), generator=generator)


def formula(x, W_enc, b_enc, center=None, mask=None, pos=None, relu=True):
    x = x.double() if center is None else x.double() - center.double()
    pre = x @ W_enc.double() + b_enc.double()
    acts = pre.clamp_min(0) if relu else pre
    return acts if mask is None else acts * mask[pos.long()].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_centred_and_masked(shape, backend, dtype, assert_close):
    x, W_enc, b_enc, center, mask, pos = inputs(shape, dtype)
    out = encode(x, W_enc, b_enc, center=center, mask=mask, pos=pos, backend=backend)
    assert out.dtype == dtype
    assert_close(out, formula(x, W_enc, b_enc, center, mask, pos), LIMIT[dtype])
    assert (out[~mask[pos]] == 0).all()


def test_any_strides_weighted_mask_and_no_rectifier(shape, backend, assert_close):
    x, W_enc, b_enc, _, mask, pos = inputs(shape, torch.float32, "strided", torch.float32)
    x = x.T.contiguous().T
    out = encode(x, W_enc, b_enc, mask=mask, pos=pos.int(), relu=False, backend=backend)
    assert_close(out, formula(x, W_enc, b_enc, mask=mask, pos=pos, relu=False))


def test_plain(shape, backend, assert_close):
    x, W_enc, b_enc, *_ = inputs(shape, torch.float32)
    assert_close(encode(x, W_enc, b_enc, backend=backend), formula(x, W_enc, b_enc))


def test_nan_comes_through_the_rectifier(shape, backend):
    x, W_enc, b_enc, *_ = inputs(shape, torch.float32)
    x[-1, -1] = torch.nan
    out = encode(x, W_enc, b_enc, backend=backend)
    assert out[-1].isnan().all()
    assert not out[:-1].isnan().any()


def test_float64_stays_float64(assert_close):
    x = torch.randn(3, 4, dtype=torch.float64)
    W_enc, b_enc = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert_close(encode(x, W_enc, b_enc), formula(x, W_enc, b_enc), 1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 3, 4)), "x must have two dimensions"),
        (dict(W_enc=torch.ones(5, 6)), r"W_enc must have shape \[D, F\] = \[4, 6\], got \[5, 6\]"),
        (dict(W_enc=torch.ones(4, 6).half()), "W_enc must have x's dtype"),
        (dict(b_enc=torch.ones(5)), r"b_enc must have shape \[F\] = \[6\], got \[5\]"),
        (dict(center=torch.ones(6)), r"center must have shape \[D\]"),
        (dict(mask=torch.ones(3, 6)), "mask needs pos"),
        (dict(mask=torch.ones(3, 6), pos=torch.tensor([0, 3])), r"pos must lie in \[0, T\) = \[0, 3\), got .* 0 to 3"),
        (dict(mask=torch.ones(3, 6), pos=torch.tensor([0, -1])), "pos must lie in"),
        (dict(mask=torch.ones(3, 6), pos=torch.tensor([0.0, 1.0])), "pos must be int32 or int64"),
        (dict(b_enc=torch.ones(6, device="meta")), "one device, got x on cpu"),
        (dict(backend="cuda"), "the backend argument is 'cuda'; allowed: torch, triton, auto"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = dict(x=torch.ones(2, 4), W_enc=torch.ones(4, 6), b_enc=torch.ones(6)) | change
    with pytest.raises(ValueError, match=message):
        encode(**arguments)
