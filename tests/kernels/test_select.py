"""select against a stable sort, the definition of its tie rule, and against plain comparison."""

import pytest
import torch
from temposae.kernels.select import select_batch_topk, select_threshold, select_topk

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
KINDS = ("normal", "rectified", "all ties", "few levels", "all negative", "zeros of both signs", "with NaN", "infinite")


def draw(n, f, kind, generator):
    acts = torch.randn(n, f, generator=generator)
    if kind == "rectified":
        acts = (acts - 0.5).relu()
    elif kind == "all ties":
        acts = acts[:, :1].expand(n, f)
    elif kind == "few levels":
        acts = acts.round()
    elif kind == "all negative":
        acts = -acts.abs() - 1
    elif kind == "zeros of both signs":
        acts = torch.where(acts < 0, -0.0, 0.0)
    elif kind == "with NaN":
        nan = torch.full((), torch.nan).copysign(torch.randn(n, f, generator=generator))
        acts = torch.where(torch.rand(n, f, generator=generator) < 0.4, nan, acts)
    elif kind == "infinite":
        acts = torch.where(acts > 0.5, torch.inf, torch.where(acts < -0.5, -torch.inf, acts))
    return acts


def rows_of_all_kinds(shape, dtype):
    generator = shape.generator
    return torch.cat([draw(1, shape.F, KINDS[n % len(KINDS)], generator) for n in range(shape.N)]).to(dtype)


def topk_by_sorting(acts, k):
    order = torch.where(acts.isnan(), torch.inf, acts).double()
    rank = torch.where(acts.isnan(), 1.0, 0.0).double()  # NaN before +inf
    order = order.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, rank.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    indices = order[:, :k].sort(1).values
    return acts.gather(1, indices), indices.int()


def same(a, b):
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) and torch.equal(a.isnan(), b.isnan())


def batch_topk_by_sorting(acts, total):
    """[N, F] bool: the first `total` of a stable sort of what is positive or NaN."""
    wide = acts.double()
    rank = torch.where(wide.isinf(), wide.sign() * 1e9, wide).nan_to_num(nan=2e9).flatten()
    order = rank.sort(descending=True, stable=True).indices
    order = order[~(acts.flatten()[order] <= 0)][:total]
    return torch.zeros(acts.numel(), dtype=torch.bool).scatter_(0, order, True).view_as(acts)


@DTYPES
@pytest.mark.parametrize("kind", ["few levels", "rectified", "all kinds"])
def test_batch_topk_is_exact(shape, backend, dtype, kind):
    generator = shape.generator
    acts = rows_of_all_kinds(shape, dtype) if kind == "all kinds" else draw(shape.N, shape.F, kind, generator).to(dtype)
    for total in (1, shape.N * shape.K, acts.numel()):
        code = select_batch_topk(acts, total, backend=backend)
        kept = batch_topk_by_sorting(acts, total)
        stored = int(kept.sum())
        assert code.values.shape == (total,)
        assert code.offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
        assert torch.equal(code.indices[:stored], kept.nonzero()[:, 1].int())
        assert same(code.values[:stored], acts[kept])
        assert (code.values[stored:] == 0).all()


@pytest.mark.random_shapes(100)
@DTYPES
def test_topk_is_exact(shape, backend, dtype):
    acts = rows_of_all_kinds(shape, dtype)
    if dtype == torch.float16:
        acts = acts.T.contiguous().T  # any strides
    code = select_topk(acts, shape.K, backend=backend)
    values, indices = topk_by_sorting(acts, shape.K)
    assert code.indices.dtype == torch.int32
    assert torch.equal(code.indices, indices)
    assert same(code.values, values)


@pytest.mark.parametrize("k", [1, 3, 64, 250, 999, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_through_groups_is_exact(kind, k):
    """The reference searches groups when F is many times K."""
    acts = draw(40, 1000, kind, torch.Generator().manual_seed(k))
    code = select_topk(acts, k, backend="torch")
    values, indices = topk_by_sorting(acts, k)
    assert torch.equal(code.indices, indices)
    assert same(code.values, values)


def test_topk_is_differentiable_in_the_reference():
    acts = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: select_topk(a, 3).values, acts)


@pytest.mark.parametrize("per_latent", [False, True], ids=["scalar", "per latent"])
@DTYPES
def test_threshold(shape, backend, dtype, per_latent):
    acts = rows_of_all_kinds(shape, dtype)
    threshold = torch.rand(shape.F, generator=shape.generator) if per_latent else 0.3
    fired = ~(acts.float() <= threshold)
    code = select_threshold(acts, threshold, backend=backend)
    assert code.overflow is None
    assert code.offsets.tolist() == [0, *fired.sum(1).cumsum(0).tolist()]
    assert torch.equal(code.indices, fired.nonzero()[:, 1].int())
    assert same(code.values, acts[fired])


@pytest.mark.parametrize("slack", [-3, 0, 7])
def test_threshold_with_a_capacity(shape, backend, slack):
    acts = rows_of_all_kinds(shape, torch.float32).nan_to_num(0.0)
    fired = acts > 0.3
    capacity = max(0, int(fired.sum()) + slack)
    code = select_threshold(acts, 0.3, capacity, backend=backend)
    assert code.values.shape == (capacity,)
    stored = min(capacity, int(fired.sum()))
    assert bool(code.overflow) == (int(fired.sum()) > capacity)
    assert code.offsets.tolist() == [0, *fired.sum(1).cumsum(0).clamp(max=capacity).tolist()]
    assert torch.equal(code.indices[:stored], fired.nonzero()[:stored, 1].int())
    assert torch.equal(code.values[:stored], acts[fired][:stored])
    assert (code.values[stored:] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_topk(torch.ones(2, 3), 0), r"k must lie in \[1, F\] = \[1, 3\], got 0"),
        (lambda: select_topk(torch.ones(2, 3), 4), "got 4"),
        (lambda: select_topk(torch.ones(3), 1), r"acts must have shape \[N, F\]"),
        (lambda: select_topk(torch.ones(2, 3).int(), 1), "acts must have a floating dtype"),
        (lambda: select_batch_topk(torch.ones(2, 3), 7), r"total must lie in \[1, N \* F\] = \[1, 6\], got 7"),
        (lambda: select_threshold(torch.ones(2, 3), torch.ones(2)), r"threshold must have shape \[F\] = \[3\]"),
        (lambda: select_threshold(torch.ones(2, 3), 0.0, -1), "capacity must be at least 0, got -1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
