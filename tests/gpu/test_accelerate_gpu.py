"""Acceleration of other libraries' classes on a GPU: against the library itself, in float32 and under autocast."""

import copy
from typing import Any

import pytest
import torch
from temposae import accelerate, accelerated, deaccelerate
from temposae.engine.accelerate import common
from torch import Tensor

from ..peers import DICTIONARIES, data, no_batch_is_too_small

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BATCHWISE = ("saelens batchtopk training", "saelens matryoshka training", "saelens topk, layer norm")
KINDS = [kind for kind in DICTIONARIES if kind not in BATCHWISE]


@pytest.fixture(autouse=True)
def alike_every_time(monkeypatch):
    no_batch_is_too_small(monkeypatch)
    monkeypatch.setattr(common, "dense_from", lambda device: 1 / 32)
    torch.manual_seed(0)


def reconstruction(sae: Any, x: Tensor) -> Tensor:
    found = sae(x)
    return getattr(found, "sae_out", found)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("sparsify")])
def test_reconstruction_and_gradients(kind):
    """float32; sparsify's own forward is under bfloat16 autocast there."""
    sae, x = DICTIONARIES[kind]().cuda(), data().cuda()
    expected = reconstruction(sae, x)
    expected.square().sum().backward()
    wanted = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    with accelerated(sae):
        found = reconstruction(sae, x)
        found.square().sum().backward()
    assert found.dtype == expected.dtype
    assert apart(found.detach(), expected.detach()) <= 1e-5
    for name, grad in wanted.items():
        assert apart(dict(sae.named_parameters())[name].grad, grad) <= 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind):
    sae, x = DICTIONARIES[kind]().cuda(), data().cuda()
    fast = accelerate(copy.deepcopy(sae))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected, found = reconstruction(sae, x), reconstruction(fast, x)
    assert found.dtype == expected.dtype
    of_tokens = (found - expected).float().norm(dim=1) / expected.float().norm(dim=1)
    assert float(of_tokens.median()) <= 1e-2  # of some the choice isn't clear: the library rounds before it chooses


def test_the_fused_step_counts_where_its_parameters_are():
    """As many steps before, within and after are those of a plain Adam."""
    ends = []
    for fast in (False, True):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(40, 30, generator=draw).cuda())
        adam = torch.optim.Adam([p], lr=1e-2)
        for step in range(9):
            if fast and step == 3:
                accelerate(adam)
            if fast and step == 6:
                deaccelerate(adam)
            p.grad = torch.randn(40, 30, generator=draw).cuda()
            adam.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
