"""What gradients and statistics need of each entry and token, against sums written out in float64."""

import pytest
import torch
from temposae.kernels.code import SparseCode
from temposae.kernels.loss import PositionSums, batch_sums, count_step, entry_loss, position_loss

SCALE = -0.3


def parts_of(shape, code, parts=3):
    draw = shape.generator
    errors, spreads = (torch.rand(parts, shape.N, generator=draw) for _ in range(2))
    return errors, torch.randn(parts, *code.values.shape, generator=draw), spreads


def used(code, entries):
    return entries.flatten()[: None if code.offsets is None else int(code.offsets[-1])]


@pytest.mark.parametrize("active_only", [True, False])
def test_parts_add_up_to_weights_and_sums(shape, backend, make_code, dense, assert_close, active_only):
    code = make_code(shape)
    errors, projections, spreads = parts_of(shape, code)
    found = entry_loss(code, errors, projections, SCALE, spread=spreads, active_only=active_only, backend=backend)
    assert_close(found.squared_error, errors.double().sum(0))
    assert_close(found.spread, spreads.double().sum(0))
    acts = dense(code)
    assert_close(found.l1, dense(code, code.values.abs()).sum(1))
    assert torch.equal(found.l0.long(), (acts != 0).sum(1))
    values, projection = used(code, code.values).double(), used(code, projections.double().sum(0))
    active = values > 0 if active_only else torch.ones_like(values)
    assert_close(used(code, found.dvalues), SCALE * projection * active)
    assert_close(used(code, found.decoder_weights), SCALE * values)
    assert_close(used(code, found.along), SCALE * values * projection)
    assert found.fired.dtype == torch.bool
    assert torch.equal(found.fired, (acts > 0).any(0))
    without = entry_loss(code, errors[:1], projections[:1], SCALE, backend=backend)
    assert without.spread is None
    assert_close(without.squared_error, errors[0])


def test_nan_stays(backend_name):
    """A projection that is not a number reaches the gradient, also at a value of zero."""
    code = SparseCode(torch.tensor([[0.0, 1.0]]), torch.tensor([[1, 2]], dtype=torch.int32), 4)
    found = entry_loss(code, torch.ones(1, 1), torch.tensor([[[torch.nan, 2.0]]]), 1.0, backend=backend_name)
    assert found.dvalues.isnan().tolist() == [[True, False]]


def test_sums_of_several_dictionaries(shape, backend, make_code, assert_close):
    """Each has the sums of its own tokens. Tokens at other positions are in the totals only."""
    code, pos = (
        make_code(shape._replace(N=2 * shape.N)),
        torch.randint(0, shape.T, (shape.N,), generator=shape.generator),
    )
    errors, projections, spreads = parts_of(shape._replace(N=2 * shape.N), code)
    tokens = entry_loss(code, errors, projections, SCALE, spread=spreads, backend=backend)
    sums, squared_error, spread = batch_sums(tokens, pos, shape.T, 2, backend=backend)
    both = torch.cat([pos, pos + shape.T])
    expected = position_loss(tokens.squared_error.double(), code, both, 2 * shape.T, backend="torch")
    for found, total in zip(sums, expected, strict=True):
        assert_close(found, total.view(2, shape.T))
    assert_close(squared_error, tokens.squared_error.double().view(2, -1).sum(1))
    assert_close(spread, tokens.spread.double().view(2, -1).sum(1))
    assert batch_sums(tokens._replace(spread=None), pos, shape.T, 2, backend=backend)[2] is None


@pytest.mark.parametrize("optional", [True, False])
def test_counts_of_a_step(shape, backend, assert_close, optional):
    (n, _, f, _, t), draw, s = shape, shape.generator, 2
    idle, fired = torch.randint(0, 9, (s, f), generator=draw), torch.rand(s, f, generator=draw) < 0.5
    sums, spread, totals = (torch.rand(*size, generator=draw) for size in ((s, 4, t), (s,), (s, 5)))
    # as of `batch_sums`: rows and a column of a wider tensor
    wide = torch.rand(s, 5, t + 1, generator=draw)
    batch, added = PositionSums(*wide[:, :4, :t].unbind(1)), wide[:, 4, t]
    loss, norm, aux_loss = (torch.rand(s, generator=draw) for _ in range(3))
    recomputed = torch.tensor([3, 5])
    before = [count.double() for count in (sums, spread, totals)]
    expected_idle = torch.where(fired, 0, idle + n)
    count_step(
        idle, sums, spread, totals, n=n, fired=fired, batch=batch, batch_spread=added if optional else added[0],
        loss=loss, aux_loss=aux_loss if optional else None, norm=norm, recomputed=recomputed if optional else None,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(idle, expected_idle)
    assert_close(sums, before[0] + torch.stack(tuple(batch), 1))
    assert_close(spread, before[1] + (added if optional else added[0]))
    zeros = torch.zeros(s)
    aux, tiles = (aux_loss, recomputed) if optional else (zeros, zeros)
    change = torch.stack([loss - aux, aux, norm, n - batch.count.sum(1), tiles], 1)
    assert_close(totals, before[2] + change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(squared_error=torch.ones(2, 3)), r"squared_error must have shape \[P, N\] = \[2, 2\], got \[2, 3\]"),
        (dict(spread=torch.ones(1, 2)), r"spread must have shape \[P, N\] = \[2, 2\], got \[1, 2\]"),
        (dict(projection=torch.ones(2, 2, 2)), r"projection must have shape \[2, 2, 1\], got \[2, 2, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    code = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), 4)
    arguments = dict(squared_error=torch.ones(2, 2), projection=torch.ones(2, 2, 1)) | change
    with pytest.raises(ValueError, match=message):
        entry_loss(code, scale=1.0, **arguments)
