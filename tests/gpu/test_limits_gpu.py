"""What only a GPU can show: a million latents, a second device, outlier tokens, hot latents at the real SPLIT, 8-bit
moments through compiled division, positions that nothing checks, and copies in flight."""

import os

import pytest
import torch
from temposae.engine.cohort import Cohort
from temposae.engine.config import MaskConfig, SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import Batch
from temposae.kernels.adam import BiasGradients, Moments, Rates, adam, adam_rows, row_norms
from temposae.kernels.autograd import encode_topk as encode_topk_with_gradients
from temposae.kernels.code import SparseCode
from temposae.kernels.configs import CONFIGS
from temposae.kernels.encode import encode
from temposae.kernels.encode_sparse import encode_threshold, encode_topk
from temposae.kernels.loss import position_loss
from temposae.kernels.weight_grad import weight_grad
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiled kernels need `pytest -m gpu`"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MILLION, WIDTH = 1_048_576, 2304  # F D > 2^31


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")


def needs_free(gib: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


def largest(acts: Tensor, k: int) -> Tensor:
    """[N, F] with the k largest of each row, the first among equals, and zeros elsewhere."""
    where = acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(acts).scatter(1, where, acts.gather(1, where))


def rates(**settings) -> Rates:
    return Rates(*(torch.tensor(value, device="cuda") for value in (0.01, 0.3, 0.5)), **settings)


# --- F = 1,048,576


def test_encode_a_million_latents():
    """Small whole numbers, so that products and sums are exact."""
    needs_free(24)
    n, k = 64, 64
    x, W = drawn(n, WIDTH, dtype=torch.bfloat16).round(), drawn(MILLION, WIDTH, seed=1, dtype=torch.bfloat16).round_()
    b = torch.zeros(MILLION, device="cuda")
    acts = torch.cat([(x.float() @ rows.float().T).relu() for rows in W.split(65536)], 1)
    assert torch.equal(encode(x, W.T, b), acts.bfloat16())
    code, _ = encode_topk(x, W.T, b, k)
    assert torch.equal(code.to_dense(), largest(acts, k))
    pos = torch.arange(n, device="cuda") % 7
    mask = (torch.arange(MILLION, device="cuda") % 7)[None] == torch.arange(7, device="cuda")[:, None]
    code, _ = encode_topk(x, W.T, b, k, mask=mask, pos=pos)
    assert torch.equal(code.to_dense(), largest(acts * mask[pos], k))


def test_bits_of_a_large_mask_take_no_wide_temporary():
    from temposae.kernels.encode.triton import hard

    mask = torch.rand(256, MILLION, device="cuda") < 0.5
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hard(mask, 128)
    assert torch.cuda.max_memory_allocated() - before < 4 * mask.numel()


def test_update_a_million_latents(assert_close):
    """Latents that fire move as in float64, the last one on every token, and no others change."""
    needs_free(60)
    n, k = 64, 64
    indices = torch.randint(MILLION, (n, k), generator=torch.Generator().manual_seed(0)).cuda().int()
    indices[:, 0], indices[::2, 1] = MILLION - 1, 2**31 // WIDTH  # here the element's index passes 2^31
    code = SparseCode(drawn(n, k, seed=2), indices, MILLION)
    x, W = drawn(n, WIDTH, seed=3, dtype=torch.bfloat16), drawn(MILLION, WIDTH, seed=4)
    touched, place = indices.flatten().unique(return_inverse=True)
    contributions = code.values[:, :, None].double() * x[:, None].double()
    grad = torch.zeros(len(touched), WIDTH, dtype=torch.float64, device="cuda")
    grad.index_add_(0, place, contributions.flatten(0, 1))
    entries, before = code.transpose(), W.clone()
    norms = row_norms(entries, code.values, x)
    assert_close(norms[touched], grad.square().sum(1))
    assert int((norms != 0).sum()) == len(touched)
    moments, shadow = Moments.zeros(W), torch.empty_like(W, dtype=torch.bfloat16)
    adam_rows(W, entries, code.values, x, moments, rates(), shadow=shadow)
    mean, square = 0.05 * grad, 0.001 * (0.5 * grad).square()
    expected = before[touched].double() - 0.01 * mean / (square.sqrt() / 0.3 + 1e-8)
    assert_close(moments.exp_avg[touched], mean)
    assert_close(moments.exp_avg_sq[touched], square)
    assert_close(W[touched], expected)
    changed = torch.cat([(a != b).any(1) for a, b in zip(W.split(65536), before.split(65536), strict=True)])
    assert torch.equal(changed.nonzero()[:, 0], touched.long())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(shadow.split(65536), W.split(65536), strict=True))


# --- a second device


def learner_on(device: str, **changes) -> Learner:
    sae = SparseAutoencoder(SAEConfig(d_in=256, d_sae=4096, k=16, aux_k=32, **changes), seed=1).to(device)
    settings = TrainConfig(tokens=5120, batch=512, lr=1e-3, dtype="bfloat16", dead_after_tokens=1, moments="8bit")
    learner = Learner(sae, settings, torch.zeros(256, device=device), 16.0, 64)
    learner.any_dead = changes.get("activation") != "jumprelu"
    return learner


def batches_on(device: str) -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    directions = torch.randn(300, 256, generator=draw)
    made = [
        Batch.of(torch.rand(512, 300, generator=draw).pow(8) @ directions, torch.randint(0, 64, (512,), generator=draw))
        for _ in range(3)
    ]
    return [batch.each(lambda value: value.to(device)) for batch in made]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "changes",
    [
        dict(activation="topk", mask=MaskConfig(kind="ranges", positions=64)),
        dict(activation="batchtopk"),
        dict(activation="jumprelu"),
    ],
    ids=["topk, mask", "batchtopk", "jumprelu"],
)
def test_kernels_run_where_their_tensors_are(changes):
    """Steps on cuda:1 while cuda:0 is current are those on cuda:0."""
    if len({torch.cuda.get_device_name(i) for i in (0, 1)}) > 1:
        pytest.skip("needs two GPUs of one kind")
    states = []
    for device in ("cuda:0", "cuda:1"):
        learner = learner_on(device, **changes)
        cohort = Cohort([learner])
        for batch in batches_on(device):
            cohort.step(batch)
        cohort.settle()
        assert torch.cuda.current_device() == 0
        learner.report()
        states.append({name: value.cpu() for name, value in learner.sae.state_dict().items()})
    for name, expected in states[0].items():
        assert torch.equal(states[1][name], expected), name


# --- data and codes at the edge


@pytest.mark.parametrize("factor", [10, 30])
@DTYPES
def test_an_outlier_token(dtype, factor):
    """One token is much larger than all others, so most of its tiles are computed again. Whole numbers are exact."""
    n, d, f, k = 700, 770, 16384, 33
    x, W = drawn(n, d).round(), drawn(f, d, seed=1).round()
    x[5] *= factor
    x, W, b = x.to(dtype), W.to(dtype), torch.zeros(f, device="cuda")
    acts = (x.double() @ W.double().T).relu().float()
    code, _ = encode_topk(x, W.T, b, k)
    assert torch.equal(code.to_dense(), largest(acts, k))
    cut = acts.flatten().topk(n * k).values[-1]
    batch_code, _ = encode_topk(x, W.T, b, k, across_batch=True)
    dense = batch_code.to_dense()
    assert int(batch_code.offsets[-1]) == n * k
    assert torch.equal(dense, torch.where(dense > 0, acts, 0))
    assert (dense[acts > cut] > 0).all()
    assert (dense[acts < cut] == 0).all()
    assert int((dense[5] > 0).sum()) > 10 * k
    code = encode_threshold(x, W.T, b, (cut + 0.5).expand(f), expected=k)
    assert torch.equal(code.to_dense(), torch.where(acts > cut + 0.5, acts, 0))


@DTYPES
def test_hot_latents_at_the_real_split(dtype, assert_close):
    """Latents with as many entries as windows and their neighbours have, at starts that are not aligned to windows."""
    split = CONFIGS[min(CONFIGS)]["windows"]["SPLIT"]
    counts = [3, split - 1, split, 1, split + 1, 2 * split, 0, 7 * split + 5, 5000, 2 * split - 1, 2]
    assert split == 256
    n, d, f = 5000, 770, len(counts)
    draw = torch.Generator().manual_seed(0)
    fires = torch.zeros(n, f, dtype=torch.bool)
    for latent, count in enumerate(counts):
        fires[torch.randperm(n, generator=draw)[:count], latent] = True
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fires.sum(1).cumsum(0)])
    indices = fires.nonzero()[:, 1].int()
    values = torch.randn(len(indices), generator=draw)
    code = SparseCode(values.cuda(), indices.cuda(), f, offsets.cuda())
    x, center, entries = drawn(n, d, seed=1, dtype=dtype), drawn(d, seed=2), code.transpose()
    assert entries.latent_offsets.diff().tolist() == counts
    grad = code.to_dense().double().T @ (x.double() - center.double())
    found = weight_grad(entries, code.values, x, center=center)
    assert_close(found, grad)
    assert torch.equal(found, weight_grad(entries, code.values, x, center=center))
    assert_close(row_norms(entries, code.values, x, center=center), grad.square().sum(1))
    results, sums = [], []
    for _ in range(2):
        W = drawn(f, d, seed=3)
        biases = BiasGradients.empty(f, center)
        adam_rows(W, entries, code.values, x, Moments.zeros(W), rates(), center=center, biases=biases)
        results.append(W)
        sums.append(biases)
    assert torch.equal(*results)
    for first, second in zip(*sums, strict=True):
        assert torch.equal(first, second)
    assert_close(biases.encoder, code.to_dense().double().sum(0))
    assert_close(biases.center[0], code.to_dense().double().sum(0) @ drawn(f, d, seed=3).double())
    mean, square = 0.05 * grad, 0.001 * (0.5 * grad).square()
    assert_close(results[0], drawn(f, d, seed=3).double() - 0.01 * mean / (square.sqrt() / 0.3 + 1e-8))


@pytest.mark.parametrize("d", [5, 770, 2304])
@pytest.mark.parametrize("how", ["a gradient of zeros", "rows without entries"])
def test_a_zero_gradient_keeps_its_codes(how, d):
    """8-bit moments then decay by their scales alone, although compiled division is not exact."""
    f = 512
    W, state = drawn(f, d), Moments.zeros(torch.empty(f, d, device="cuda"), "8bit")
    seeds = [torch.tensor(seed, dtype=torch.int32, device="cuda") for seed in range(20)]
    for step in range(5):
        grad = drawn(f, d, seed=step) * torch.logspace(-3, 0, d, device="cuda")
        adam(W, grad, state, rates(seed=seeds[step]))
    codes, scales = [moment.clone() for moment in state[:2]], state.scales.clone()
    n = 3  # tokens, on which only latent 0 fires
    code = SparseCode(torch.ones(n, 1, device="cuda"), torch.zeros(n, 1, dtype=torch.int32, device="cuda"), f)
    for seed in seeds[5:]:
        if how == "a gradient of zeros":
            adam(W, torch.zeros_like(W), state, rates(seed=seed))
        else:
            adam_rows(W, code.transpose(), code.values, drawn(n, d, seed=9), state, rates(seed=seed))
    first = 0 if how == "a gradient of zeros" else 1
    for before, after in zip(codes, state[:2], strict=True):
        assert torch.equal(before[first:], after[first:])
    decay = torch.tensor([0.9, 0.999], device="cuda") ** 15
    torch.testing.assert_close(state.scales[first:], scales[first:] * decay, rtol=1e-4, atol=0)


# --- positions and copies


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_ops_read_the_nearest_row_of_a_mask(kind, backend, monkeypatch):
    monkeypatch.setenv("TEMPOSAE_BACKEND", backend)
    n, d, f, t = 96, 128, 4096, 8
    far = torch.randint(-(10**9), 10**9, (n,), generator=torch.Generator().manual_seed(0)).cuda()
    far[::2] = torch.arange(n // 2, device="cuda") % (t + 4) - 2
    mask = torch.rand(t, f, generator=torch.Generator().manual_seed(1)).cuda()
    mask = mask > 0.5 if kind == "hard" else mask.requires_grad_()
    results = []
    for pos in (far, far.clamp(0, t - 1)):
        W = drawn(f, d, seed=1).requires_grad_()
        code, _ = encode_topk_with_gradients(drawn(n, d), W.T, torch.zeros(f, device="cuda"), mask=mask, pos=pos, k=16)
        wanted = [W, mask] if kind == "soft" else [W]
        gradients = torch.autograd.grad(code.values.square().sum(), wanted)
        acts = encode(drawn(n, d), W.detach().T, torch.zeros(f, device="cuda"), mask=mask.detach(), pos=pos)
        results.append([code.values.detach(), code.indices, acts, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    inside = (far >= 0) & (far < t)
    values = torch.ones(n, 1, device="cuda")
    sums = position_loss(drawn(n, d), values, far, t)
    for a, b in zip(sums, position_loss(drawn(n, d)[inside], values[inside], far[inside], t), strict=True):
        torch.testing.assert_close(a, b)
    assert int(sums.count.sum()) == int(inside.sum())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "autograd"])
@pytest.mark.parametrize("kind", ["none", "ranges", "soft"])
def test_positions_are_reported_and_never_waited_for(kind, fused):
    mask = MaskConfig(kind=kind, positions=32, beyond="error") if kind != "none" else MaskConfig()
    learner = learner_on("cuda", mask=mask)
    cohort = Cohort([learner], fused=None if fused else False)
    good, other, wrong = batches_on("cuda")
    for batch in (good, other):
        batch.pos.remainder_(32)
    cohort.step(good)
    if fused:
        torch.cuda.set_sync_debug_mode("error")
    try:
        cohort.step(other)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cohort.settle()
    assert learner.report()["loss"] > 0
    if kind != "none":
        wrong.pos.remainder_(32)[3] = 33
        cohort.step(wrong)
        cohort.settle()
        with pytest.raises(UserError, match="sae.mask.positions: 32 is not allowed; it must be at least 34"):
            learner.report()
    wrong.pos[:2] = torch.tensor([64, -5], device="cuda")
    cohort.step(wrong)
    cohort.settle()
    for refuses in (learner.report, learner.state):
        with pytest.raises(UserError, match=r"must lie in \[0, T\) = \[0, 64\)"):
            refuses()
    torch.cuda.synchronize()  # no error of the device


def test_rates_in_flight_are_not_overwritten():
    """Steps are launched while the device is busy; each finds its own rates, and the host does not wait."""
    cohort = Cohort([learner_on("cuda")])
    assert cohort.fused is not None
    stacked, steps = cohort.fused.stacked, range(1, 200)
    pool = [torch.empty(1, pin_memory=True) for _ in range(256)]
    del pool  # its memory is used again, so that none is allocated while the device is busy
    busy = drawn(4096, 4096)
    torch.cuda.synchronize()
    for _ in range(40):
        busy = busy @ busy / 64
    done = torch.cuda.Event()
    seen = []
    for step in steps:
        stacked.set_rates([step / 7], step)
        seen.append(stacked._rates[0].clone())
        if step == 1:
            done.record()
    assert not done.query()
    expected = torch.tensor([step / 7 / (1 - stacked.config.beta1**step) for step in steps])
    torch.testing.assert_close(torch.cat(seen).cpu(), expected, rtol=1e-6, atol=0)
