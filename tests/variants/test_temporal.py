"""Convolutions along rows."""

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from .conftest import D

LENGTH = 20
#: of three rows of tokens: a whole one, one that lacks some of its tokens, and one that begins late
ROWS = [list(range(LENGTH)), [0, 1, 4, 5, 9, 10, 11, 12], list(range(3, 12))]
POS = torch.tensor([p for row in ROWS for p in row])


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(POS), D, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_stack_of_causal_depth_wise_convolutions(made, assert_close):
    sae = made("dilated_conv", seed=3).double()
    (part,) = sae.parts
    x = tokens().double()
    found, at = part.input(x, BatchView(sae, x, POS, LENGTH)), 0
    for row in ROWS:
        y, kept = torch.zeros(D, LENGTH, dtype=torch.float64), torch.zeros(LENGTH, dtype=torch.float64)
        y[:, row], kept[row] = x[at : at + len(row)].T, 1
        for dilation, taps in zip((1, 2, 4), part.taps, strict=True):
            weight = taps.flip(0).T[:, None]  # torch's last is the token itself
            padded = torch.nn.functional.pad(y, (2 * dilation, 0))
            y = (y + torch.nn.functional.conv1d(padded, weight, dilation=dilation, groups=D)) * kept
        assert_close(found[at : at + len(row)], y[:, row].T, 1e-12)
        at += len(row)


def test_codes_depend_on_the_14_tokens_before_and_on_nothing_later(made):
    sae, x = made("dilated_conv"), tokens()
    with torch.no_grad():
        sae.parts[0].taps.mul_(20)
    whole = sae.encode(x, POS)
    for t in (0, 4, 10):
        other = x.clone()
        other[t] += 1
        changed = (sae.encode(other, POS) != whole).any(1).nonzero().flatten()
        assert int(changed[0]) == t
        assert int(changed[-1]) == min(t + 14, LENGTH - 1)  # 2 (1 + 2 + 4), and never in the next row


def test_dilations_say_how_far_back_it_looks(made):
    sae, x = made("dilated_conv", dilations=[1, 2]), tokens()
    other = x.clone()
    other[0] += 1
    assert (sae.encode(other, POS) != sae.encode(x, POS)).any(1).nonzero().flatten().tolist() == list(range(7))


def test_without_it_tokens_before_do_not_matter(made):
    sae, x = made(parts=[]), tokens()
    other = x.clone()
    other[0] += 1
    assert (sae.encode(other, POS) != sae.encode(x, POS)).any(1).nonzero().flatten().tolist() == [0]


def test_it_starts_near_the_token_itself(made):
    sae, x = made("dilated_conv"), tokens()
    change = (sae.parts[0].input(x, BatchView(sae, x, POS, LENGTH)) - x).detach()
    assert 0 < float(change.norm() / x.norm()) < 0.1


def test_bad_settings_of_convolutions_are_named(made):
    with pytest.raises(UserError, match="sae.parts.dilated_conv.dilations.0: 0 is not allowed"):
        made("dilated_conv", dilations=[0])
    with pytest.raises(UserError, match="sae.parts.dilated_conv.dilations"):
        made("dilated_conv", dilations=[])
    with pytest.raises(UserError, match="sae.parts.dilated_conv.kernel: 1 is not allowed"):
        made("dilated_conv", kernel=1)
