"""adam against torch's own optimiser, and adam_rows against a gradient written out in float64."""

import pytest
import torch
from temposae.kernels.adam import BiasGradients, Moments, Rates, adam, adam_rows, cost, row_norms
from temposae.kernels.code import SparseCode
from temposae.kernels.configs import CONFIGS
from temposae.kernels.fp8 import Fp8Rows
from temposae.kernels.weight_grad import weight_grad


def rates(step=3, lr=0.01, factor=0.7, seed=None):
    numbers = (lr / (1 - 0.9**step), (1 - 0.999**step) ** 0.5, factor)
    return Rates(*map(torch.tensor, numbers), seed=None if seed is None else torch.tensor(seed, dtype=torch.int32))


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
    adam_rows(
        W, code.transpose(), code.values, rows, state, rates(), center=center, unit_norm=unit_norm, shadow=shadow,
        backend=backend,
    )  # fmt: skip
    assert_close(state.exp_avg, mean, name="exp_avg")
    assert_close(state.exp_avg_sq, square, name="exp_avg_sq")
    assert_close(W, moved, name="W")
    assert_close(W - before, moved - before.double(), 1e-4, name="step")  # a small difference of large numbers
    assert torch.equal(shadow, W.half())


def test_norms_are_those_of_the_gradient(shape, backend, make_code, dense, unit_norm, assert_close):
    code, (W, rows, center, _) = make_code(shape), drawn(shape, unit_norm)
    norms = row_norms(code.transpose(), code.values, rows, center=center, W=W if unit_norm else None, backend=backend)
    assert_close(norms, expected_gradient(dense(code), W, rows, center, unit_norm).square().sum(1))


@pytest.mark.parametrize("pass_name", ["update", "norms"])
def test_a_pass_also_gives_gradients_of_biases(shape, backend, make_code, dense, assert_close, pass_name):
    """Two runs of latents, each with a center. The update and the norms are the same bits as without biases."""
    code = make_code(shape._replace(F=2 * shape.F))
    W, rows, _, state = drawn(shape._replace(F=2 * shape.F), False)
    center, entries, before = torch.randn(2, W.shape[1], generator=shape.generator), code.transpose(), W.clone()
    biases, results = BiasGradients.empty(len(W), center), []
    for wanted in (biases, None):
        if pass_name == "update":
            W, moments = before.clone(), Moments(*(moment.clone() for moment in state[:2]))
            adam_rows(W, entries, code.values, rows, moments, rates(), center=center, biases=wanted, backend=backend)
            results.append(W)
        else:
            encoder = None if wanted is None else W
            settings = dict(center=center, W=encoder, biases=wanted, backend=backend)
            results.append(row_norms(entries, code.values, rows, **settings))
    assert torch.equal(*results)
    sums = dense(code).sum(0)
    assert_close(biases.encoder, sums)
    assert_close(biases.center, torch.einsum("sf,sfd->sd", sums.view(2, -1), before.double().view(2, shape.F, -1)))


def test_biases_that_do_not_fit_are_named():
    code, W = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 4), torch.ones(4, 5)
    entries, rows, center = code.transpose(), torch.ones(2, 5), torch.ones(5)
    with pytest.raises(ValueError, match="biases need W and a center"):
        row_norms(entries, code.values, rows, W=W, biases=BiasGradients.empty(4, center))
    with pytest.raises(ValueError, match=r"biases.encoder must have shape \[F\] = \[4\], got \[3\]"):
        row_norms(entries, code.values, rows, W=W, center=center, biases=BiasGradients.empty(3, center))
    biases = BiasGradients.empty(4, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"biases.center must have shape \[S, D\] = \[1, 5\], got \[2, 5\]"):
        adam_rows(W, entries, code.values, rows, Moments.zeros(W), rates(), center=center, biases=biases)


def test_the_update_uses_what_the_norms_packed(shape, backend, make_code, monkeypatch):
    code, (W, rows, center, state) = make_code(shape), drawn(shape, False)
    entries, shared, before, results = code.transpose(), {}, W.clone(), []
    norms = [
        row_norms(entries, code.values, rows, center=center, shared=each, backend=backend) for each in (shared, None)
    ]
    assert torch.equal(*norms)
    for each in (None, shared):
        W, moments = before.clone(), Moments(*(moment.clone() for moment in state[:2]))
        if each is shared and backend == "triton":  # a second gather would raise
            monkeypatch.delattr("temposae.kernels.adam.triton.gather_arguments")
        adam_rows(W, entries, code.values, rows, moments, rates(), center=center, shared=each, backend=backend)
        results.append(W)
    assert torch.equal(*results)


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
        results.append((W, *state[:2]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


KINDS = ["float32", "bfloat16", "8bit"]


def rates_of_two(seeded, skip=None):
    both = [rates(step, lr, factor, seed=step) for step, lr, factor in ((3, 0.01, 0.7), (5, 0.1, 0.2))]
    together = Rates(*(torch.stack(pair) for pair in list(zip(*both, strict=True))[:3]), skip=skip)
    return both, together._replace(seed=torch.stack([one.seed for one in both]) if seeded else None)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_rows_have_rates_of_their_own(backend_name, kind, unit_norm):
    """The same bits as one after the other."""
    start, grad = torch.nn.functional.normalize(spread(10, 33), dim=1), spread(10, 33, seed=1)
    both, together = rates_of_two(kind != "float32")
    W, state = start.clone(), Moments.zeros(start, kind)
    adam(W, grad, state, together, unit_norm=unit_norm, backend=backend_name)
    for nth, one in enumerate(both):
        run = slice(5 * nth, 5 * nth + 5)
        w, alone = start[run].clone(), Moments.zeros(start[run], kind)
        adam(w, grad[run], alone, one, unit_norm=unit_norm, backend=backend_name)
        assert torch.equal(W[run], w)
        assert not torch.equal(w, start[run])
        for found, expected in zip(state, alone, strict=True):
            assert (found is None and expected is None) or torch.equal(found[run], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_and_a_gradient_say_the_same(backend_name, kind, unit_norm, assert_close):
    """adam_rows and adam on the gradient of two runs of latents, each with its centre and rates."""
    generator = torch.Generator().manual_seed(0)
    code = SparseCode(torch.rand(16, 3, generator=generator),
                      torch.randint(0, 10, (16, 3), generator=generator, dtype=torch.int32), 10)  # fmt: skip
    rows, center = (torch.randn(n, 33, generator=generator) for n in (8, 2))
    _, together = rates_of_two(kind != "float32")
    start = torch.nn.functional.normalize(spread(10, 33), dim=1)
    results = []
    for _ in range(2):
        W, state, shadow = start.clone(), Moments.zeros(start, kind), torch.empty(10, 33, dtype=torch.float16)
        settings = dict(unit_norm=unit_norm, shadow=shadow, backend=backend_name)
        if results:
            grad = weight_grad(code.transpose(), code.values, rows, center=center, backend="torch")
            adam(W, grad, state, together, **settings)
        else:
            adam_rows(W, code.transpose(), code.values, rows, state, together, center=center, **settings)
        assert torch.equal(shadow, W.half())
        results.append(W - start)
    assert_close(*results, 1e-4)
    assert (results[0].norm(dim=1) > 0).all()


def same(found, expected):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("d", [33, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_in_fp8_is_what_quantising_again_gives(backend_name, kind, d, unit_norm):
    """The same bits, also for rows of zeros, of tiny and of very different numbers. A skipped step leaves it as it was."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 8, (16, 2), generator=generator, dtype=torch.int32)
    code = SparseCode(torch.rand(16, 2, generator=generator), indices, 12)  # the last 4 latents never fire
    start, rows = spread(12, d), spread(16, d, seed=1)
    if unit_norm:
        start = torch.nn.functional.normalize(start, dim=1)
    else:
        start[9], start[10], start[11, 0] = 0, start[10] * 1e-38, 1e4
    grad = weight_grad(code.transpose(), code.values, rows, backend="torch")
    for shadow_dtype, skip, by_entries in ((torch.float16, None, True), (torch.float16, None, False), (None, None, True),
                                           (None, None, False), (None, torch.tensor(True), True)):  # fmt: skip
        W, state, copy = start.clone(), Moments.zeros(start, kind), Fp8Rows.of(rows[:12])
        shadow = None if shadow_dtype is None else torch.empty_like(W, dtype=shadow_dtype)
        before = Fp8Rows(*(tensor.clone() for tensor in copy))
        settings = dict(unit_norm=unit_norm, shadow=shadow, fp8=copy, backend=backend_name)
        rates_now = rates(seed=None if kind == "float32" else 5)._replace(skip=skip)
        if by_entries:
            adam_rows(W, code.transpose(), code.values, rows, state, rates_now, **settings)
        else:
            adam(W, grad, state, rates_now, **settings)
        assert same(copy, before if skip is not None else Fp8Rows.of(W if shadow is None else shadow))
        assert not same(copy, Fp8Rows.of(start))


@pytest.mark.random_shapes(200)
def test_any_parameter_moves_as_in_float64(shape, backend, unit_norm, assert_close):
    W, _, _, state = drawn(shape, unit_norm)
    before, grad, shadow = W.clone(), spread(*W.shape, seed=2), torch.empty_like(W, dtype=torch.float16)
    across = 0.7 * grad.double()
    if unit_norm:
        across -= (across * W.double()).sum(1, keepdim=True) * W.double()
    mean = 0.9 * state.exp_avg.double() + 0.1 * across
    square = 0.999 * state.exp_avg_sq.double() + 0.001 * across.square()
    moved = W.double() - 0.01 / (1 - 0.9**3) * mean / (square.sqrt() / (1 - 0.999**3) ** 0.5 + 1e-8)
    if unit_norm:
        moved = moved / moved.norm(dim=1, keepdim=True)
    adam(W, grad, state, rates(), unit_norm=unit_norm, shadow=shadow, backend=backend)
    assert_close(state.exp_avg, mean, name="exp_avg")
    assert_close(state.exp_avg_sq, square, name="exp_avg_sq")
    assert_close(W, moved, name="W")
    assert_close(W - before, moved - before.double(), 1e-4, name="step")
    assert torch.equal(shadow, W.half())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_to_skip_changes_nothing(backend_name, kind, unit_norm):
    code = SparseCode(torch.ones(4, 1), torch.arange(4, dtype=torch.int32)[:, None] * 2, 10)
    start, grad = torch.nn.functional.normalize(spread(10, 33), dim=1), spread(10, 33, seed=1)
    for skip in (True, False):
        _, together = rates_of_two(kind != "float32", skip=torch.tensor(skip))
        for by_entries in (True, False):
            W, state, shadow = start.clone(), Moments.zeros(start, kind), torch.zeros_like(start)
            settings = dict(unit_norm=unit_norm, shadow=shadow, backend=backend_name)
            if by_entries:
                adam_rows(W, code.transpose(), code.values, grad[:4], state, together, **settings)
            else:
                adam(W, grad, state, together, **settings)
            before = (start, *Moments.zeros(start, kind), torch.zeros_like(start))
            found = [now is None or torch.equal(now, old) for now, old in zip((W, *state, shadow), before, strict=True)]
            assert all(found) if skip else not any(found[:3])


NARROW = pytest.mark.parametrize("kind", ["bfloat16", "8bit"])


def narrow_moments(grads, kind, seed=0):
    """Moments after steps on grads [steps, F, D], by the reference."""
    state, W = Moments.zeros(grads[0], kind), torch.zeros_like(grads[0])
    for nth, grad in enumerate(grads):
        adam(W, grad, state, rates(nth + 1, seed=seed + 1000 * nth), backend="torch")
    return state


def spread(*size, seed=0):
    """Normal numbers, of sizes from 1e-3 to 1 by column."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 0, size[-1])


@NARROW
def test_narrow_rows_move_as_in_float64_and_round_to_a_neighbour(shape, backend, make_code, dense, kind, assert_close):
    code, (W, rows, center, _) = make_code(shape), drawn(shape, unit_norm=True)
    state = narrow_moments(torch.stack([0.1 * spread(*W.shape, seed=seed) for seed in range(3)]), kind)
    old_mean, old_square = (moment.double() for moment in state.widened())
    grad = 0.7 * expected_gradient(dense(code), W, rows, center, unit_norm=True)
    mean, square = 0.9 * old_mean + 0.1 * grad, 0.999 * old_square + 0.001 * grad.square()
    moved = W.double() - 0.01 / (1 - 0.9**3) * mean / (square.sqrt() / (1 - 0.999**3) ** 0.5 + 1e-8)
    moved = moved / moved.norm(dim=1, keepdim=True)
    before, shadow = W.clone(), torch.empty_like(W, dtype=torch.float16)
    adam_rows(
        W, code.transpose(), code.values, rows, state, rates(seed=5), center=center, unit_norm=True, shadow=shadow,
        backend=backend,
    )  # fmt: skip
    assert_close(W - before, moved - before.double(), 1e-4, name="step")
    assert torch.equal(shadow, W.half())
    new_mean, new_square = (moment.double() for moment in state.widened())
    # a step is at most an eighth of the value (bfloat16: 2^-7), and near zero an even one
    step, even = (2**-7, 0) if kind == "bfloat16" else (2**-3, 2**-18)
    largest = mean.abs().amax(1, keepdim=True)
    assert ((new_mean - mean).abs() <= 1.01 * (step * mean.abs() + even * largest) + 1e-7 * largest).all()
    largest = square.amax(1, keepdim=True)
    assert ((new_square - square).abs() <= 1.01 * (step * square + even * 2**-16 * largest) + 1e-30).all()
    assert ((new_square > 0) == (square > 0)).all()


@NARROW
@pytest.mark.parametrize("d", [1, 7, 270])
def test_backends_round_with_the_same_bits(kind, d, assert_close):
    """Given the gradient, moments by the kernel and the reference agree to the bit, after steps on end."""
    pytest.importorskip("triton")
    results = []
    for backend in ("torch", "triton"):
        W, state, shadow = torch.ones(5, d), Moments.zeros(torch.ones(5, d), kind), torch.empty(5, d).half()
        for nth in range(4):
            grad = spread(5, d, seed=nth)
            grad[3] = 0
            adam(W, grad, state, rates(nth + 1, seed=7 * nth - 9), shadow=shadow, backend=backend)
        assert torch.equal(shadow, W.half())
        results.append((W - 1, *state[:2], *state.widened()))
    (moved, *ours), (expected, *theirs) = results
    assert_close(moved, expected, 1e-6 / 0.01)  # float32 around 1, beside steps of 0.01
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@NARROW
def test_rounding_is_right_in_expectation(kind):
    """The same row many times, so that only the random bits differ: their mean is Adam's in float64."""
    copies, d = 20_000, 24
    start = narrow_moments(torch.stack([spread(1, d, seed=seed) for seed in range(3)]), kind)
    state = Moments(*(None if t is None else t.repeat(copies, 1) for t in start))
    old_mean, old_square = (moment[0].double() for moment in start.widened())
    grad = spread(1, d, seed=9).expand(copies, d).contiguous()
    adam(torch.zeros(copies, d), grad, state, rates(seed=3), backend="torch")
    g = 0.7 * grad[0].double()
    expected = (0.9 * old_mean + 0.1 * g, 0.999 * old_square + 0.001 * g.square())
    deviations = []
    for found, exact in zip(state.widened(), expected, strict=True):
        deviation = found.double() - exact
        noise = deviation.std(0)
        assert (deviation.mean(0).abs() <= 5 * noise / copies**0.5 + 2e-6 * exact.abs()).all()
        random = noise > 1e-6 * exact.abs()  # all but what a code hits, such as the largest
        assert random.double().mean() > 0.8
        deviations.append(torch.where(random, deviation / noise, 0.0))
    together = (deviations[0] * deviations[1]).mean(0)  # the two moments are rounded independently
    assert (together.abs() <= 5 / copies**0.5).all()


@NARROW
def test_exp_avg_sq_does_not_stall(kind):
    """A gradient of constant size: exp_avg_sq tends to its square. Rounded to nearest in bfloat16, it stops at a third."""
    size = torch.logspace(-4, 0, 500).expand(4, -1).contiguous()
    state, W, nearest = Moments.zeros(size, kind), torch.zeros_like(size), torch.zeros_like(size).bfloat16()
    ratios = []
    for nth in range(3000):
        adam(W, size, state, rates(nth + 1, factor=1.0, seed=nth), backend="torch")
        nearest = (0.999 * nearest.float() + 0.001 * size.square()).bfloat16()
        if nth >= 2500:
            ratios.append(state.widened()[1] / size.square() / (1 - 0.999 ** (nth + 1)))
    ratio = torch.stack(ratios).mean(0)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ((ratio > 0.3) & (ratio < 2)).all()
    assert (nearest.float() / size.square()).mean() < 0.5


@NARROW
def test_rows_without_gradient_decay_and_zero_stays_zero(kind, backend_name):
    state = narrow_moments(torch.stack([spread(6, 30, seed=seed) for seed in range(3)]), kind)
    for tensor in state:
        if tensor is not None:
            tensor[::2] = 0  # never fired
    codes = [moment.clone() for moment in state[:2]]
    means, squares = (moment[1::2].double() for moment in state.widened())
    W = torch.ones(6, 30)
    for nth in range(10):
        adam(W, torch.zeros(6, 30), state, rates(nth + 4, seed=nth), backend=backend_name)
    assert (W[::2] == 1).all()
    for moment, before, decay in zip(state.widened(), (means, squares), (0.9**10, 0.999**10), strict=True):
        assert (moment[::2] == 0).all()
        ratio = moment[1::2].double().abs().sum() / before.abs().sum()
        assert ratio == pytest.approx(decay, rel=1e-5 if kind == "8bit" else 1e-2)
    if kind == "8bit":  # by its scales alone
        assert all(torch.equal(before, after) for before, after in zip(codes, state[:2], strict=True))
    if state.scales is not None:
        state.scales.fill_(1e-37)  # as after ages; float32 hardly holds what follows
    for _ in range(3):
        adam(W, torch.zeros(6, 30), state, rates(100, seed=1), backend=backend_name)
    assert W.isfinite().all()


@NARROW
def test_a_tiny_second_moment_beside_a_huge_one(kind, backend_name):
    """Gradients of 1e-7 beside one of 1: exp_avg_sq in between must not vanish, or exp_avg / eps would be the step."""
    grad = torch.full((3, 50), 1e-7)
    grad[:, 0] = 1
    state, W = Moments.zeros(grad, kind), torch.zeros_like(grad)
    for nth in range(20):
        adam(W, grad, state, rates(nth + 1, lr=0.01, factor=1.0, seed=nth), backend=backend_name)
    assert W.abs().max() < 1.5 * 20 * 0.01
    assert (W[:, 0] + 0.2).abs().max() < 0.02


@NARROW
def test_rounding_follows_seed_row_and_column_alone(kind):
    """Rows from the second on of a larger parameter are rounded as there; another seed rounds otherwise."""
    grads = torch.stack([spread(6, 20, seed=seed) for seed in range(3)])
    whole, again, other = (narrow_moments(grads, kind, seed) for seed in (4, 4, 5))
    part = narrow_moments(grads[:, 2:], kind, 6)
    for nth in range(2):
        assert torch.equal(whole[nth], again[nth])
        assert not torch.equal(whole[nth], other[nth])
        assert torch.equal(whole[nth][2:], part[nth])


def test_narrow_moments_are_smaller():
    W = torch.zeros(64, 2304)
    for kind, per_parameter in (("float32", 8), ("bfloat16", 4), ("8bit", 2)):
        held = sum(t.untyped_storage().nbytes() for t in Moments.zeros(W, kind) if t is not None)
        assert per_parameter * W.numel() <= held <= 1.01 * per_parameter * W.numel()
    sizes = {size: cost(1, 2304, 64, 0, moment_itemsize=size).bytes / W.numel() for size in (4, 2, 1)}
    assert sizes == {4: 26, 2: 18, 1: pytest.approx(14, rel=1e-3)}  # weight, two moments, and a copy in half precision


@pytest.mark.parametrize(
    ("parameter", "state", "seed", "message"),
    [
        (
            (4, 5),
            ("bfloat16", "bfloat16"),
            None,
            r"rates.seed must be int32 for torch.bfloat16 moments, got None",
        ),
        (
            (20,),
            ("bfloat16", "bfloat16"),
            1,
            r"parameter must be \[F, D\] for unit_norm, narrow moments and fp8, got \[20\]",
        ),
        ((4, 5), ("float32", "bfloat16"), 1, "moments must be .* got torch.float32 and torch.bfloat16"),
        ((4, 5), ("float16", "float16"), 1, "moments must be .* got torch.float16 and torch.float16"),
        ((4, 5), ("int8", "uint8"), 1, "scales must be given for 8-bit moments, and for no others"),
    ],
)
def test_narrow_moments_that_do_not_fit_are_named(parameter, state, seed, message, backend_name):
    W = torch.ones(parameter)
    state = Moments(*(torch.zeros_like(W, dtype=getattr(torch, name)) for name in state))
    with pytest.raises(ValueError, match=message):
        adam(W, W, state, rates(seed=seed), backend=backend_name)
    W = torch.ones(4, 5)
    for scales in (torch.zeros(4), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"scales must have shape \[F, scales\] = \[4, 2\]"):
            adam(W, W, Moments.zeros(W, "8bit")._replace(scales=scales), rates(seed=1), backend=backend_name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(W=torch.ones(4, 4)), r"W must have shape \[F, D\] = \[4, 5\], got \[4, 4\]"),
        (dict(W=torch.ones(5, 4).T), "parameter must be contiguous"),
        (dict(values=torch.ones(3)), "values must have one element for each of 2 entries, got 3"),
        (dict(rows=torch.ones(2)), r"rows must have shape \[M, D\], got \[2\]"),
        (dict(center=torch.ones(4)), r"center must have shape \[D\] = \[5\], got \[4\]"),
        (dict(shadow=torch.ones(3, 5)), r"shadow must have the parameter's shape \[4, 5\], got \[3, 5\]"),
        (
            dict(fp8=Fp8Rows.of(torch.ones(3, 5))),
            r"fp8.rows must have shape \[F, columns\] = \[4, 128\], got \[3, 128\]",
        ),
        (
            dict(fp8=Fp8Rows(torch.ones(4, 128), torch.ones(4))),
            "fp8 must be e4m3 with float32 scales, got torch.float32",
        ),
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
