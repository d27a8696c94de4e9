"""Optimisers made faster in place: the same numbers, state and class afterwards."""

import copy

import pytest
import torch
from temposae import accelerate, accelerated, deaccelerate
from temposae.engine.errors import UserError
from torch.optim import SGD, Adam, AdamW


def made(cls, **settings):
    draw = torch.Generator().manual_seed(0)
    return cls([torch.nn.Parameter(torch.randn(40, 30, generator=draw))], lr=1e-2, **settings)


def step(optimizer, n=1):
    (p,) = optimizer.param_groups[0]["params"]
    draw = torch.Generator().manual_seed(1)
    for _ in range(n):
        p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return p.detach().clone()


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}])
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_steps_before_within_and_after_are_the_same(cls, settings):
    plain, fast = made(cls, **settings), made(cls, **settings)
    torch.testing.assert_close(step(fast), step(plain))
    with accelerated(fast):
        assert isinstance(fast, cls)
        assert fast.param_groups[0]["fused"]
        torch.testing.assert_close(step(fast, 3), step(plain, 3), rtol=1e-6, atol=1e-7)
    assert type(fast) is cls
    assert {"fused": fast.param_groups[0]["fused"], "foreach": fast.param_groups[0]["foreach"]} == {
        "fused": plain.param_groups[0]["fused"], "foreach": plain.param_groups[0]["foreach"],
    }  # fmt: skip
    torch.testing.assert_close(step(fast, 3), step(plain, 3), rtol=1e-6, atol=1e-7)
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_state_goes_to_a_plain_one_and_back():
    plain, fast = made(Adam), accelerate(made(Adam))
    step(plain), step(fast)
    other = made(Adam)
    other.load_state_dict(fast.state_dict())
    other.param_groups[0]["params"][0].data.copy_(plain.param_groups[0]["params"][0].data)
    torch.testing.assert_close(step(other), step(plain), rtol=1e-6, atol=1e-7)
    assert type(copy.deepcopy(fast)) is Adam
    assert deaccelerate(fast) is fast
    assert not fast.param_groups[0]["fused"]


def test_others_are_named():
    sgd = made(SGD)
    with pytest.raises(UserError, match="accelerate: torch's SGD is not allowed"):
        accelerate(sgd)
    meta = Adam([torch.nn.Parameter(torch.zeros(3, device="meta"))])
    with pytest.raises(UserError, match="Adam with a parameter of torch.float32 on meta is not allowed"):
        accelerate(meta)
