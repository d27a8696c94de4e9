"""Acceleration of other libraries' classes: the same object, results, gradients and files, and what is refused."""

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from temposae import accelerate, accelerated, deaccelerate
from temposae.engine.accelerate import KINDS, is_accelerated
from temposae.engine.errors import UserError
from torch import Tensor, nn

from .peers import DICTIONARIES, D, F, N, data, learning, library, no_batch_is_too_small, saelens, trainer

pytestmark = pytest.mark.slow
BATCHWISE = ("saelens batchtopk training", "saelens matryoshka training")


@pytest.fixture(autouse=True)
def alike_every_time(monkeypatch):
    no_batch_is_too_small(monkeypatch)
    torch.manual_seed(0)


def outputs(sae: Any, x: Tensor) -> Iterator[Tensor]:
    if hasattr(sae, "num_latents"):
        found = sae(x, dead_mask=torch.arange(F) % 3 == 0)
        yield from (found.sae_out, found.fvu, found.auxk_loss, found.latent_acts.sort(dim=1).values)
    else:
        yield sae.encode(x)
        yield sae(x)


def gradients(sae: Any, x: Tensor, within: Any = None) -> dict[str, Tensor]:
    """Of everything that gets one."""
    x = x.clone().requires_grad_()
    sae.zero_grad()
    with within or contextlib.nullcontext():
        found = list(outputs(sae, x))
    sum((one.to(x.dtype) * torch.linspace(0.5, 1.5, one.numel()).view_as(one)).sum() for one in found).backward()
    every = {"x": x.grad, **{name: one.grad for name, one in sae.named_parameters()}}
    return {name: grad for name, grad in every.items() if grad is not None}


def apart(found: Tensor, expected: Tensor) -> float:
    size = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / size)


def as_good(found: Tensor, theirs: Tensor, true: Tensor, what: str) -> None:
    """In float32 as the library has it; in bfloat16 about as near to float64's as that, a single number to a rounding."""
    assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape), what
    if theirs is true:
        assert apart(found, theirs) <= 1e-5, f"{what}: {apart(found, theirs):.2g}"
        return
    tolerance = torch.finfo(torch.bfloat16).eps if found.ndim == 0 else 5e-3
    ours, other = apart(found, true), apart(theirs, true)
    assert ours <= max(tolerance, 1.5 * other), f"{what}: {ours:.2g}, theirs {other:.2g}"


def wide(sae: Any) -> Any:
    sae = copy.deepcopy(sae).to(torch.float64)
    if hasattr(sae, "hook_dict"):
        sae.dtype = torch.float64
        if hasattr(sae, "bandwidth"):
            sae._parameters["threshold"].data = sae.threshold.data.double()
    return sae


def active(sae: Any, x: Tensor) -> Tensor:
    if hasattr(sae, "num_latents"):
        top = sae.encode(x)
        return torch.zeros(len(x), F, dtype=torch.bool).scatter(1, top.top_indices, top.top_acts > 0)
    return sae.encode(x) > 0


@torch.no_grad()
def clear(sae: Any, n: int, one_by_one: bool) -> Tensor:
    """Tokens of which no latent is nearly kept, or hardly: in bfloat16 the libraries round before they choose."""
    plain, x = wide(sae), data(9, 300 if one_by_one else 40_000).bfloat16().double()
    draw, same = torch.Generator().manual_seed(4), []
    for part in x.split(1 if one_by_one else 4000):
        noise = 1 + 0.03 * torch.randn(8, *part.shape, generator=draw).double()
        here = active(plain, part)
        same.append(here.any(1) & torch.stack([(active(plain, part * by) == here).all(1) for by in noise]).all(0))
    same = torch.cat(same)
    found = x[same][:n].float()
    assert len(found) == n
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_outputs_and_gradients_are_the_same(kind, precision):
    sae, x, within = DICTIONARIES[kind](), data(), contextlib.nullcontext()
    if precision != "float32":
        x = clear(sae, 1 if kind in BATCHWISE else N, kind in BATCHWISE)
    if precision == "bfloat16":
        sae, x = sae.to(torch.bfloat16), x.bfloat16()
    if precision == "autocast":
        within = torch.autocast("cpu", torch.bfloat16)
    cls, keys = type(sae), list(sae.state_dict())

    def found() -> tuple[list[Tensor], dict[str, Tensor]]:
        with within:
            got = [one.detach() for one in outputs(sae, x)]
        return got, gradients(sae, x, within)

    expected, wanted = found()
    truth, true_gradients = expected, wanted
    if precision != "float32":
        plain = wide(sae)
        truth, true_gradients = [one.detach() for one in outputs(plain, x.double())], gradients(plain, x.double())
    assert accelerate(sae) is sae
    assert isinstance(sae, cls)
    assert is_accelerated(sae)
    assert list(sae.state_dict()) == keys
    got, derived = found()
    for one, theirs, true in zip(got, expected, truth, strict=True):
        as_good(one, theirs, true, kind)
    assert set(derived) == set(wanted)
    for name, gradient in derived.items():
        as_good(gradient, wanted[name], true_gradients[name], name)
    assert deaccelerate(sae) is sae
    assert type(sae) is cls


def test_every_class_has_its_tests():
    names = {type(make()).__name__ for make in DICTIONARIES.values()}
    trainers = {name for _, name in KINDS if "Trainer" in name}
    assert names | trainers == {name for _, name in KINDS}


def test_the_work_goes_through_our_ops(monkeypatch):
    """Not just the same because nothing changed."""
    from temposae.kernels import ops

    calls = []
    real = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    for make in DICTIONARIES.values():
        calls.clear()
        sae = make()
        sae(data())
        assert not calls
        with accelerated(sae), torch.no_grad():
            sae(data())
        assert calls
        calls.clear()
        sae(data())
        assert not calls


def test_small_batches_are_left_to_the_library(monkeypatch):
    from temposae.kernels import ops

    monkeypatch.undo()
    calls, real = [], ops.decode
    monkeypatch.setattr(ops, "decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    for make in (lambda: saelens("topk"), lambda: saelens("standard"), lambda: learning("topk")):
        calls.clear()
        sae = accelerate(make())
        sae(data())
        assert not calls
        sae(data(n=4096))
        assert calls


def test_many_active_latents_are_looked_for_again_now_and_then(monkeypatch):
    """After 15 calls of the library's own code."""
    from temposae.engine.accelerate import common

    looks, real = [], common.active_per_token
    monkeypatch.setattr(common, "active_per_token", lambda *a: looks.append(1) or real(*a))
    sae = accelerate(saelens("standard"))
    with torch.no_grad():
        sae.b_enc.add_(10)
    for _ in range(17):
        sae(data())
    assert len(looks) == 2
    with torch.no_grad():
        sae.b_enc.sub_(10)
    for _ in range(15):
        sae(data())
    assert len(looks) == 2
    sae(data())
    sae(data())
    assert len(looks) == 4


def test_hooks_are_called_as_before():
    plain, seen = saelens("topk"), []
    sae = accelerate(copy.deepcopy(plain))
    for name in ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"):
        expected: list[Tensor] = []
        for one, kept in ((plain, expected), (sae, seen)):
            kept.clear()
            with one.hooks(fwd_hooks=[(name, lambda value, hook, kept=kept: kept.append(value.detach()))]):
                one(data())
        assert len(seen) == 1
        assert apart(seen[0], expected[0]) <= 1e-5
    _, cache = sae.run_with_cache(data())
    assert cache["hook_sae_acts_pre"].shape == (N, F)

    def ablate(acts: Tensor, hook: Any) -> Tensor:
        return acts * 0

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", ablate)]):
        assert apart(sae(data()).detach(), sae.b_dec.detach().expand(N, D)) <= 1e-5


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_what_is_saved_is_loaded_by_the_library(kind, tmp_path):
    sae = accelerate(DICTIONARIES[kind]())
    own = type(sae).library_class
    if kind.startswith("saelens"):
        sae.save_model(tmp_path)
        bases = library("sae_lens", "saes.sae")
        loaded = (bases.TrainingSAE if "training" in kind else bases.SAE).load_from_disk(tmp_path)
    elif kind.startswith("sparsify"):
        sae.save_to_disk(tmp_path)
        loaded = own.load_from_disk(tmp_path)
    else:
        torch.save(sae.state_dict(), tmp_path / "ae.pt")
        settings = {"normalize_decoder": False} if kind.endswith("standard") else {}
        loaded = own.from_pretrained(tmp_path / "ae.pt", **settings)
    assert type(loaded) is own
    deaccelerate(sae)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for found, expected in zip(outputs(loaded, data()), outputs(sae, data()), strict=True):
        assert torch.equal(found, expected)


def test_copies_are_of_the_librarys_class():
    sae = accelerate(saelens("topk"))
    assert type(copy.deepcopy(sae)) is type(saelens("topk"))
    restored = pickle.loads(pickle.dumps(accelerate(learning("topk"))))
    assert type(restored) is type(learning("topk"))
    assert torch.equal(restored.b_dec, learning("topk").b_dec)


def test_a_block_ends_with_what_it_began_with():
    sae = saelens("topk")
    with pytest.raises(RuntimeError, match="size"), accelerated(sae):
        sae(torch.zeros(3, D + 1))
    assert not is_accelerated(sae)
    with accelerated(accelerate(sae)):
        pass
    assert is_accelerated(sae)


def meta(sae: Any) -> None:
    sae.to("meta")


def tied(sae: Any) -> None:
    sae.W_dec.data = sae.W_enc.data.T


def strided(sae: Any) -> None:
    sae.W_dec.data = torch.zeros(F, 2 * D)[:, ::2]


def mixed(sae: Any) -> None:
    sae.b_dec.data = sae.b_dec.data.double()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (meta, "TopKSAE.b_dec is on the meta device"), (tied, "shares its memory with .*tied views are not allowed"),
        (strided, "W_dec is not contiguous"), (mixed, "has dtype torch.float32, b_dec torch.float64"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_left_alone(spoil, message):
    sae = saelens("topk")
    spoil(sae)
    with pytest.raises(UserError, match=message) as error:
        accelerate(sae)
    assert "\n" not in str(error.value)
    assert not is_accelerated(sae)


def test_other_classes_are_named_and_left_alone():
    saes = library("sae_lens", "saes")
    temporal = saes.MatchingPursuitSAE(saes.MatchingPursuitSAEConfig(d_in=D, d_sae=F))
    for one, name in (
        (temporal, "sae_lens's MatchingPursuitSAE"), (nn.Linear(2, 3), "torch's Linear"), (3, "builtins's int"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"accelerate: {name} is not allowed"):
            accelerate(one)
    assert type(temporal) is saes.MatchingPursuitSAE


def test_a_trainer_of_an_unknown_dictionary_is_left_alone():
    one = trainer("topk")
    cls, one.ae = type(one), nn.Linear(2, 3)
    with pytest.raises(UserError, match="accelerate: torch's Linear is not allowed"):
        accelerate(one)
    assert type(one) is cls
    assert not is_accelerated(one.optimizer)
