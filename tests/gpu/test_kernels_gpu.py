"""The Triton kernels on a CUDA GPU at real sizes: against float64, against the definition, and against themselves.

Run with `pytest -m gpu`; without the marker Triton is interpreted and these tests are skipped.
"""

import os

import pytest
import torch
from temposae.kernels.adam import Moments, Rates, adam, adam_rows, row_norms
from temposae.kernels.autograd import encode_topk, position_loss, reconstruct
from temposae.kernels.backend import has_fp8, has_wgmma
from temposae.kernels.code import SparseCode
from temposae.kernels.configs import CONFIGS
from temposae.kernels.decode import decode, decode_values_grad
from temposae.kernels.decode import reconstruct as reconstruct_op
from temposae.kernels.encode import encode
from temposae.kernels.encode_sparse import encode_threshold
from temposae.kernels.encode_sparse import encode_topk as encode_topk_op
from temposae.kernels.encoder_inputs import EncoderInputs
from temposae.kernels.fp8 import Fp8Rows
from temposae.kernels.select import select_batch_topk, select_threshold, select_topk
from temposae.kernels.weight_grad import weight_grad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiled kernels need `pytest -m gpu`"),
]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(
    ("n", "d", "f", "k"),
    [(1, 5, 7, 7), (1000, 770, 5003, 33), (513, 100, 999, 50), (4096, 2304, 16384, 64)],
    ids=lambda size: str(size),
)
POSITIONS = 127


@pytest.fixture(autouse=True)
def _triton(monkeypatch, poisoned):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")


@pytest.fixture(params=["plain", "persistent"])
def candidates_kernel(request, use_persistent):
    use_persistent(request.param == "persistent")


@pytest.fixture
def use_persistent(monkeypatch):
    """use_persistent(bool) chooses the kernel for candidates, and skips where there is only the plain one."""

    def choose(use):
        if use and not has_wgmma(torch.device("cuda")):
            pytest.skip("the persistent kernel is for sm_90")
        for row in CONFIGS.values():
            entry = row["encode_topk_persistent"]
            monkeypatch.setitem(row, "encode_topk_persistent", entry | dict(USE=int(use)))

    return choose


def normal(*size, dtype=torch.float32, seed=0):
    """Drawn on the CPU, so the same on every GPU; representable in `dtype`."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def positions(n):
    return torch.arange(n, device="cuda") * 7 % POSITIONS


def draw_code(n, f, k, dtype, ragged):
    """Latent 0 fires on every token; the ragged code has tokens without entries and unused entries of NaN."""
    indices = normal(n, f, seed=1)[:, 1:].topk(k - 1).indices + 1
    indices = torch.cat([indices.new_zeros(n, 1), indices.sort(1).values], 1).int()
    values = normal(n, k, dtype=dtype, seed=2)
    if not ragged:
        return SparseCode(values, indices, f)
    keep = normal(n, k, seed=3) > -0.5
    keep[::3] = False
    values = torch.cat([values[keep], values.new_full((100,), torch.nan)])
    indices = torch.cat([indices[keep], indices.new_full((100,), 2**31 - 1)])
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return SparseCode(values, indices, f, offsets)


@SHAPES
@DTYPES
def test_encode(n, d, f, k, dtype, assert_close):
    x, W_enc = normal(n, d, dtype=dtype), normal(f, d, dtype=dtype, seed=1).T
    b_enc, center = normal(f, seed=2), normal(d, dtype=dtype, seed=3)
    mask, pos = normal(POSITIONS, f, seed=4) > 0, positions(n)
    pre = (x.double() - center.double()) @ W_enc.double() + b_enc.double()
    expected = pre.relu() * mask[pos]
    for layout in (W_enc, W_enc.contiguous(), W_enc.repeat_interleave(2, 1)[:, ::2]):
        assert_close(encode(x, layout, b_enc, center=center, mask=mask, pos=pos), expected, LIMIT[dtype])
    x[-1, -1] = torch.nan
    acts = encode(x, W_enc, b_enc)
    assert acts[-1].isnan().all()
    assert not acts[:-1].isnan().any()


@pytest.mark.parametrize(("n", "f"), [(1, 7), (300, 5003), (100, 65536)], ids=["N1-F7", "N300-F5003", "N100-F65536"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["normal", "rectified", "few levels", "with NaN"])
def test_topk_is_exact(n, f, dtype, kind):
    acts = normal(n, f, dtype=dtype)
    if kind == "rectified":
        acts = (acts - 2).relu()
    elif kind == "few levels":
        acts = acts.round()
    elif kind == "with NaN":
        acts = torch.where(normal(n, f, seed=1) > 1.5, torch.full_like(acts, torch.nan).copysign(acts), acts)
    for k in (1, min(f, 64), f // 2, f):
        code = select_topk(acts, k)
        expected = acts.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
        assert torch.equal(code.indices, expected.int())
        assert torch.equal(code.values.nan_to_num(99), acts.gather(1, expected).nan_to_num(99))


def largest(acts, k):
    """[N, F] with the k largest of each row, the first among equals, and zeros elsewhere."""
    where = acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(acts).scatter(1, where, acts.gather(1, where))


@pytest.mark.parametrize(("n", "d", "f", "k"), [(700, 770, 5003, 33), (513, 96, 70_000, 50), (1000, 2304, 16384, 64)])
@pytest.mark.parametrize("kind", ["whole numbers", "random", "all in one tile"])
@DTYPES
@pytest.mark.usefixtures("candidates_kernel")
def test_encoded_topk_is_exact(n, d, f, k, kind, dtype, assert_close):
    """Small whole numbers: every product and sum is exact, and there are ties; the set must be the one of the definition."""
    x, W_enc, b_enc = normal(n, d, dtype=dtype), normal(f, d, dtype=dtype, seed=1).T / 4, normal(f, seed=2)
    if kind == "whole numbers":
        x, W_enc, b_enc = x.round(), (4 * W_enc).round(), b_enc.round()
    if kind == "all in one tile":
        b_enc[256:384] += 1000
    aux_latents = torch.arange(f, device="cuda") % 5 == 0
    code, aux = encode_topk_op(x, W_enc, b_enc, k, aux_k=k // 2, aux_latents=aux_latents)
    acts = (x.double() @ W_enc.double() + b_enc.double()).relu()
    for found, expected in ((code, largest(acts, k)), (aux, largest(acts * aux_latents, k // 2))):
        dense = found.to_dense()
        if kind == "whole numbers":
            assert torch.equal(dense > 0, expected > 0)
        else:  # near ties may fall either way, so their values count
            assert ((dense > 0) == (expected > 0)).double().mean() > 0.9999
            assert_close(dense.sort(1).values, expected.sort(1).values, LIMIT[dtype])
        at = found.indices.long()
        assert_close(found.values, acts.gather(1, at) * (found.values > 0), LIMIT[dtype])
    again, _ = encode_topk_op(x, W_enc, b_enc, k, aux_k=k // 2, aux_latents=aux_latents)
    assert torch.equal(again.values, code.values)
    assert torch.equal(again.indices, code.indices)


@pytest.mark.parametrize(("n", "d", "f"), [(1, 8, 7), (700, 776, 5003), (193, 64, 70_016), (8192, 2304, 65536)])
@pytest.mark.parametrize("thresholded", [False, True], ids=["two codes", "thresholds"])
def test_both_kernels_give_the_same_candidates(n, d, f, thresholded, use_persistent):
    """Bit for bit, in every one of 20 calls."""
    operands = pytest.importorskip("temposae.kernels.encode.triton").operands
    sparse = pytest.importorskip("temposae.kernels.encode_sparse.candidates")
    x, W_enc = normal(n, d, dtype=torch.bfloat16), normal(f, d, dtype=torch.bfloat16, seed=1).T / 4
    inputs = EncoderInputs(x, W_enc, normal(f, seed=2), None, None, None)
    aux_latents = torch.arange(f, device="cuda") % 5 == 0
    settings = (0, None, normal(f, seed=3).abs()) if thresholded else (4, aux_latents, None)
    expected = None
    for use in (False, *[True] * 20):
        use_persistent(use)
        launch = operands("encode_topk", inputs)
        assert sparse.is_persistent(launch) == use
        candidates = sparse.Candidates(launch, 4, *settings)
        expected = expected or candidates
        assert torch.equal(candidates.packed, expected.packed)
        assert torch.equal(candidates.aux_packed, expected.aux_packed)


@pytest.mark.parametrize(("n", "d", "f", "k"), [(700, 770, 5003, 33), (1000, 2304, 16384, 64)])
@pytest.mark.parametrize("kind", ["whole numbers", "random", "all in one tile"])
@DTYPES
@pytest.mark.usefixtures("candidates_kernel")
def test_encoded_ragged_codes_are_exact(n, d, f, k, kind, dtype, assert_close):
    x, W_enc, b_enc = normal(n, d, dtype=dtype), normal(f, d, dtype=dtype, seed=1).T / 4, normal(f, seed=2)
    if kind == "whole numbers":
        x, W_enc, b_enc = x.round(), (4 * W_enc).round(), b_enc.round()
    if kind == "all in one tile":
        b_enc[256:384] += 1000
    mask, pos = normal(POSITIONS, f, seed=4) > 0, positions(n)
    acts = (x.double() @ W_enc.double() + b_enc.double()).relu() * mask[pos]
    cut = acts.flatten().topk(n * k).values[-1]
    codes = [encode_topk_op(x, W_enc, b_enc, k, mask=mask, pos=pos, across_batch=True)[0] for _ in range(2)]
    codes += [
        encode_threshold(x, W_enc, b_enc, cut.float().expand(f), mask=mask, pos=pos, expected=k) for _ in range(2)
    ]
    for code, again in (codes[:2], codes[2:]):
        assert torch.equal(code.values, again.values)
        assert torch.equal(code.indices, again.indices)
        dense = code.to_dense()
        assert (
            (dense > 0) == (acts >= cut)
        ).double().mean() > 0.999  # near ties and ties at the cut may fall either way
        assert_close(dense[dense > 0], acts[dense > 0], LIMIT[dtype])
        assert (acts[dense > 0] >= cut * (1 - 0.02)).all()
        assert (acts[dense == 0] <= cut * (1 + 0.02)).all()
    assert codes[0].offsets[-1] == n * k


@DTYPES
def test_batch_topk_is_exact(dtype):
    acts = normal(1000, 5003, dtype=dtype).relu()
    for total in (1, 33_333, 10**6, acts.numel()):
        code = select_batch_topk(acts, total)
        order = acts.flatten().sort(descending=True, stable=True).indices[:total]
        kept = torch.zeros(acts.numel(), dtype=torch.bool, device="cuda").scatter_(0, order, True).view_as(acts) & (
            acts > 0
        )
        stored = int(kept.sum())
        assert torch.equal(code.indices[:stored], kept.nonzero()[:, 1].int())
        assert torch.equal(code.values[:stored], acts[kept])
        assert torch.equal(code.offsets[1:], kept.sum(1).cumsum(0))


@SHAPES
@DTYPES
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed K", "ragged"])
def test_reconstruction_and_update(n, d, f, k, dtype, ragged, assert_close):
    code, limit = draw_code(n, f, k, torch.float32, ragged), LIMIT[dtype]
    W_dec, b_dec, x = normal(f, d, dtype=dtype, seed=4), normal(d, seed=5), normal(n, d, dtype=dtype, seed=6)
    dense = code.to_dense().double()
    found = reconstruct_op(code, W_dec, b_dec, x)
    residual = x.double() - dense @ W_dec.double() - b_dec.double()
    used = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    where = code.rows.flatten()[:used], code.indices.flatten()[:used].long()
    assert_close(found.residual, residual, limit)
    assert_close(found.squared_error, residual.square().sum(1))
    assert_close(found.projection.flatten()[:used], (residual @ W_dec.double().T)[where])
    assert (found.projection.flatten()[used:] == 0).all()

    entries, center = code.transpose(), normal(d, seed=7)
    for unit_norm in (False, True):
        W = torch.nn.functional.normalize(normal(f, d, seed=8), dim=1)
        grad = dense.T @ (x.double() - center.double())
        if unit_norm:
            grad -= (grad * W.double()).sum(1, keepdim=True) * W.double()
        norms = row_norms(entries, code.values, x, center=center, W=W if unit_norm else None)
        assert_close(norms, grad.square().sum(1))
        results = []
        for _ in range(2):
            updated, shadow = W.clone(), torch.empty_like(W, dtype=torch.bfloat16)
            moments = Moments(*(0.1 * torch.ones_like(W) for _ in range(2)))
            rates = Rates(*(torch.tensor(v, device="cuda") for v in (0.01, 0.3, 0.5)))
            fp8 = Fp8Rows.of(W) if has_fp8(W.device) else None
            adam_rows(
                updated, entries, code.values, x, moments, rates, center=center, unit_norm=unit_norm, shadow=shadow,
                fp8=fp8,
            )  # fmt: skip
            results.append((updated, *moments[:2], shadow))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        mean, square = 0.09 + 0.1 * 0.5 * grad, 0.0999 + 0.001 * (0.5 * grad).square()
        expected = W.double() - 0.01 * mean / (square.sqrt() / 0.3 + 1e-8)
        if unit_norm:
            expected /= expected.norm(dim=1, keepdim=True)
        updated, exp_avg, exp_avg_sq, shadow = results[0]
        assert_close(exp_avg, mean)
        assert_close(exp_avg_sq, square)
        assert_close(updated, expected)
        assert torch.equal(shadow, updated.bfloat16())
        if fp8 is not None:  # the last pass, which was the same bits
            requantised = Fp8Rows.of(shadow)
            assert torch.equal(fp8.rows.view(torch.uint8), requantised.rows.view(torch.uint8))
            assert torch.equal(fp8.scale, requantised.scale)


@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
@pytest.mark.parametrize(("f", "d"), [(7, 5), (999, 770), (16384, 2304)])
def test_narrow_moments_are_rounded_as_by_the_reference(f, d, kind, assert_close):
    """The compiled kernel may fuse a product and a sum, so a few in 10,000 elements may fall to their other neighbour."""
    results = []
    for backend in ("torch", "triton"):
        W, moments = torch.zeros(f, d, device="cuda"), Moments.zeros(torch.zeros(f, d, device="cuda"), kind)
        rates = [torch.tensor(v, device="cuda") for v in (0.01, 0.3, 0.5)]
        seed = torch.tensor(-5, dtype=torch.int32, device="cuda")
        grad = normal(f, d) * torch.logspace(-3, 0, d, device="cuda")
        adam(W, grad, moments, Rates(*rates, seed=seed), backend=backend)
        results.append((W, moments))
    (expected, theirs), (found, ours) = results
    assert_close(found, expected)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        a, b = (t.view(torch.int16) if kind == "bfloat16" else t for t in (a, b))  # neighbours are one apart
        apart = (a.int() - b.int()).abs()
        assert apart.max() <= 1
        assert apart.double().mean() <= 1e-3
    if kind == "8bit":
        assert_close(ours.scales, theirs.scales, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threshold(dtype):
    acts, threshold = normal(1000, 5003, dtype=dtype), normal(5003, seed=1).abs()
    fired = acts.float() > threshold
    total = int(fired.sum())
    for capacity in (None, total - 10, total + 10):
        code = select_threshold(acts, threshold, capacity)
        stored = total if capacity is None else min(total, capacity)
        assert (capacity is not None and capacity < total) == (code.overflow is not None and bool(code.overflow))
        assert torch.equal(code.values[:stored], acts[fired][:stored])
        assert torch.equal(code.indices[:stored], fired.nonzero()[:stored, 1].int())
        assert torch.equal(code.offsets[1:], fired.sum(1).cumsum(0).clamp(max=stored))


@SHAPES
@DTYPES
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed K", "ragged"])
def test_sparse_ops(n, d, f, k, dtype, ragged, assert_close):
    code, limit = draw_code(n, f, k, dtype, ragged), LIMIT[dtype]
    W_dec, b_dec, rows = normal(f, d, dtype=dtype, seed=4), normal(d, seed=5), normal(n, d, dtype=dtype, seed=6)
    dense = code.to_dense().double()
    x_hat = dense @ W_dec.double() + b_dec.double()
    assert_close(decode(code, W_dec, b_dec), x_hat, limit)
    assert_close(decode(code, W_dec, b_dec, target=rows), rows.double() - x_hat, limit)
    assert_close(weight_grad(code.transpose(), code.values, rows), dense.T @ rows.double())

    used = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    grad = decode_values_grad(code, W_dec, rows).flatten()
    where = code.rows.flatten()[:used], code.indices.flatten()[:used].long()
    assert_close(grad[:used], (rows.double() @ W_dec.double().T)[where], limit)
    assert (grad[used:] == 0).all()

    pos = positions(n)
    sums = position_loss(rows, code, pos, POSITIONS)
    at = torch.nn.functional.one_hot(pos, POSITIONS).T.double()
    by_token = torch.stack([torch.ones(n, device="cuda"), rows.double().square().sum(1), dense.abs().sum(1),
                            (dense != 0).sum(1)], 1)  # fmt: skip
    for name, out, expected in zip(sums._fields, sums, (at @ by_token.double()).T, strict=True):
        assert_close(out, expected, name=name)


@SHAPES
@DTYPES
def test_step_gradients_and_the_same_bits_twice(n, d, f, k, dtype, assert_close):
    pos, target = positions(n), normal(n, d, dtype=dtype, seed=5)
    x = normal(n, d, dtype=dtype)
    shapes = dict(W_enc=(f, d), b_enc=(f,), center=(d,), W_dec=(f, d), b_dec=(d,), mask=(POSITIONS, f))
    parameters = {
        name: normal(*size, dtype=dtype, seed=seed).float() for seed, (name, size) in enumerate(shapes.items())
    }
    parameters["W_enc"] = parameters["W_enc"].T / 2 ** round(d**0.5).bit_length()
    parameters["mask"] = (parameters["mask"].abs() + 0.125).to(dtype).float()
    aux_latents = torch.arange(f, device="cuda") % 3 == 0

    def step():
        p = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        code, aux = encode_topk(
            x, p["W_enc"], p["b_enc"], p["center"], p["mask"], pos, k=k, aux_k=k // 2, aux_latents=aux_latents
        )
        squared_error, residual = reconstruct(code, p["W_dec"], p["b_dec"], target)
        left, _ = reconstruct(aux, p["W_dec"], torch.zeros_like(p["b_dec"]), residual)
        sums = position_loss(squared_error, code, pos, POSITIONS)
        loss = sums.squared_error.sum() + sums.l1.sum() + left.sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(p.values()))], code, aux

    (loss, *grads), code, aux = step()
    p = {name: parameter.double().requires_grad_() for name, parameter in parameters.items()}
    acts = torch.relu((x.double() - p["center"]) @ p["W_enc"] + p["b_enc"]) * p["mask"][pos]
    chosen, aux_chosen = (c.with_values((c.values > 0).double()).to_dense() for c in (code, aux))
    residual = target.double() - (acts * chosen) @ p["W_dec"] - p["b_dec"]
    left = residual.detach() - (acts * aux_chosen) @ p["W_dec"]
    expected = residual.square().sum() + (acts * chosen).sum() + left.square().sum()
    assert_close(loss, expected, LIMIT[dtype], "loss")
    for name, grad, reference in zip(p, grads, torch.autograd.grad(expected, list(p.values())), strict=True):
        assert_close(grad, reference, LIMIT[dtype], f"gradient of {name}")

    assert all(torch.equal(a, b) for a, b in zip([loss, *grads], step()[0], strict=True))
