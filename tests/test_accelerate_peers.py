"""Acceleration of other libraries' classes: the same object, results, gradients, steps and files, and what is refused."""

import copy
import pickle
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from temposae import accelerate, accelerated, deaccelerate
from temposae.bench.providers import skip_init
from temposae.engine.accelerate import is_accelerated
from temposae.engine.errors import UserError
from torch import Tensor, nn

pytestmark = pytest.mark.slow
D, F, K, N = 24, 160, 8, 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def data(seed: int = 0, n: int = N) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def library(name: str, module: str = "") -> Any:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "dictionary_learning":
        skip_init(name, unless="nnsight")
    return import_module(f"{name}.{module}" if module else name)


def drawn(module: Any) -> Any:
    """With random biases, and decoder rows of several norms."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
            elif "dec" not in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw).to(tensor))
    return module


def saelens(kind: str, **changes: Any) -> Any:
    saes = library("sae_lens", "saes")
    cls, config = {
        "topk": (saes.TopKSAE, saes.TopKSAEConfig), "topk training": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig),
        "batchtopk training": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig),
    }[kind]  # fmt: skip
    return drawn(cls(config(**{"d_in": D, "d_sae": F, "k": K, **changes})))


def learning(kind: str) -> Any:
    module, name = {"topk": ("top_k", "AutoEncoderTopK"), "batchtopk": ("batch_top_k", "BatchTopKSAE")}[kind]
    made = drawn(getattr(library("dictionary_learning", f"trainers.{module}"), name)(D, F, K))
    made.threshold.fill_(2.0 if kind == "batchtopk" else -1.0)
    return made


def trainer(kind: str) -> Any:
    module, name = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer")}[kind]
    cls = getattr(library("dictionary_learning", f"trainers.{module}"), name)
    sizes = {"steps": 100, "activation_dim": D, "dict_size": F, "k": K, "warmup_steps": 0, "threshold_start_step": 1}
    return cls(**sizes, layer=0, lm_name="none", seed=0, device="cpu", lr=1e-2)


@pytest.fixture(autouse=True)
def alike_every_time(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    torch.manual_seed(0)


def coder(**changes: Any) -> Any:
    sparsify = library("sparsify")
    made = drawn(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**{"num_latents": F, "k": K, **changes})))
    if changes.get("transcode"):
        made.W_dec.data.normal_(generator=torch.Generator().manual_seed(3))
    return made


DICTIONARIES: dict[str, Callable[[], Any]] = {
    "saelens topk": lambda: saelens("topk"),
    "saelens topk, counting norms": lambda: saelens("topk", rescale_acts_by_decoder_norm=True),
    "saelens topk, without b_dec": lambda: saelens("topk", apply_b_dec_to_input=False),
    "saelens topk, layer norm": lambda: saelens("topk", normalize_activations="layer_norm"),
    "saelens topk training": lambda: saelens("topk training"),
    "saelens batchtopk training": lambda: saelens("batchtopk training"),
    "dictionary_learning topk": lambda: learning("topk"),
    "dictionary_learning batchtopk": lambda: learning("batchtopk"),
    "sparsify": coder,
    "sparsify transcoder": lambda: coder(transcode=True),
    "sparsify with skip": lambda: coder(skip_connection=True),
}


def outputs(sae: Any, x: Tensor) -> Iterator[Tensor]:
    if hasattr(sae, "W_skip"):
        found = sae(x, dead_mask=torch.arange(F) % 3 == 0)
        yield from (found.sae_out, found.fvu, found.auxk_loss, found.latent_acts.sort(dim=1).values)
    else:
        yield sae.encode(x)
        yield sae(x)


def gradients(sae: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    sae.zero_grad()
    sum((one * torch.linspace(0.5, 1.5, one.numel()).view_as(one)).sum() for one in outputs(sae, x)).backward()
    return {"x": x.grad, **{name: one.grad for name, one in sae.named_parameters()}}


def close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    apart = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert apart <= tolerance, f"{what}: {apart:.2g}"


def as_good(found: Tensor, theirs: Tensor, true: Tensor, tolerance: float, what: str) -> None:
    """As the library has it, in float32; in bfloat16, about as near to float64's as that, a single number to a rounding."""
    tolerance = max(tolerance, torch.finfo(found.dtype).eps) if found.ndim == 0 else tolerance
    assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape), what
    size = true.double().norm().clamp_min(1e-30)
    ours, other = ((one.double() - true.double()).norm() / size for one in (found, theirs))
    assert ours <= max(tolerance, 1.5 * float(other)), f"{what}: {ours:.2g}, theirs {other:.2g}"


def of_dtype(sae: Any, dtype: torch.dtype) -> Any:
    sae = sae.to(dtype)
    if hasattr(sae, "hook_dict"):
        sae.dtype = dtype
    return sae


def clear(sae: Any, n: int) -> Tensor:
    """Tokens of which no latent is nearly kept, or hardly: in bfloat16 the libraries round before they choose."""
    plain = of_dtype(copy.deepcopy(sae), torch.float64)
    weights = [getattr(plain, "W_enc", None), getattr(plain, "b_enc", None)]
    W, b = weights if weights[0] is not None else (plain.encoder.weight.T, plain.encoder.bias)
    x = data(9, 20_000).bfloat16().double()
    centred = (
        plain.process_sae_in(x) if hasattr(plain, "process_sae_in") else x - plain.b_dec * (not _is_transcoder(sae))
    )
    pre = centred @ W + b
    if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        pre = pre * plain.W_dec.norm(dim=1)
    top = pre.topk(K + 1).values
    apart = (top[:, K - 1] > 1.06 * top[:, K]) & ((pre - 2.0).abs().amin(1) > 0.04)
    return x[apart][:n].float()


def _is_transcoder(sae: Any) -> bool:
    return bool(getattr(getattr(sae, "cfg", None), "transcode", False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_outputs_and_gradients_are_the_same(kind, dtype):
    sae, x = DICTIONARIES[kind]().to(dtype), data().to(dtype)
    if dtype == torch.bfloat16:
        x = clear(sae, 1 if "batchtopk" in kind else N).to(dtype)
        assert len(x) == (1 if "batchtopk" in kind else N)
    cls, keys = type(sae), list(sae.state_dict())
    expected, wanted = [one.detach() for one in outputs(sae, x)], gradients(sae, x)
    truth, true_gradients = expected, wanted
    if dtype == torch.bfloat16:
        wide = of_dtype(copy.deepcopy(sae), torch.float64)
        truth, true_gradients = [one.detach() for one in outputs(wide, x.double())], gradients(wide, x.double())
    assert accelerate(sae) is sae
    assert isinstance(sae, cls)
    assert is_accelerated(sae)
    assert list(sae.state_dict()) == keys
    for found, one, true in zip(outputs(sae, x), expected, truth, strict=True):
        as_good(found.detach(), one, true, TOLERANCE[dtype], kind)
    for name, gradient in gradients(sae, x).items():
        as_good(gradient, wanted[name], true_gradients[name], TOLERANCE[dtype], name)
    assert deaccelerate(sae) is sae
    assert type(sae) is cls


def inputs(x: Tensor, dead: Tensor | None) -> Any:
    return library("sae_lens", "saes.sae").TrainStepInput(x, {}, dead, 0, False)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kind", ["topk training", "batchtopk training"])
def test_a_training_step_of_saelens_is_the_same(kind, dead):
    mask = (torch.arange(F) % 4 == 0) if dead else None
    plain = saelens(kind)
    fast = accelerate(copy.deepcopy(plain))
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (plain, fast)]
    for step in range(3):
        found = [sae.training_forward_pass(inputs(data(step), mask)) for sae in (plain, fast)]
        for name, loss in found[0].losses.items():
            close(found[1].losses[name].detach(), loss.detach(), 1e-5, name)
        close(found[1].feature_acts.detach(), found[0].feature_acts.detach(), 1e-5)
        close(found[1].hidden_pre.detach(), found[0].hidden_pre.detach(), 1e-5)
        for output, optimizer in zip(found, optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        for (name, own), other in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
            close(other, own, 1e-5, name)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_an_update_of_dictionary_learnings_trainer_is_the_same(kind, dead):
    plain, fast = trainer(kind), accelerate(trainer(kind))
    assert is_accelerated(fast.ae)
    for one in (plain, fast):
        one.num_tokens_since_fired[::4] = one.dead_feature_threshold if dead else 0
    for step in range(4):
        # Adam's first step is g / |g|: with other data a gradient that is nothing but rounding decides where a bias goes
        losses = [one.update(step, data(step + 20)) for one in (plain, fast)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for (name, own), other in zip(plain.ae.state_dict().items(), fast.ae.state_dict().values(), strict=True):
            close(other, own, 1e-5, name)
        assert torch.equal(plain.num_tokens_since_fired, fast.num_tokens_since_fired)
        assert plain.dead_features == fast.dead_features
    deaccelerate(fast)
    assert type(fast) is type(plain)
    assert type(fast.ae) is type(plain.ae)


def test_the_work_goes_through_our_ops(monkeypatch):
    """Not just the same because nothing changed."""
    from temposae.engine import ops

    calls = []
    real = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    for make in DICTIONARIES.values():
        calls.clear()
        sae = make()
        sae(data())
        assert not calls
        with accelerated(sae):
            sae(data())
        assert calls
        calls.clear()
        sae(data())
        assert not calls


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
        close(seen[0], expected[0], 1e-5, name)
    _, cache = sae.run_with_cache(data())
    assert cache["hook_sae_acts_pre"].shape == (N, F)

    def ablate(acts: Tensor, hook: Any) -> Tensor:
        return acts * 0

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", ablate)]):
        close(sae(data()).detach(), sae.b_dec.detach().expand(N, D), 1e-5)


def test_files_and_copies_are_of_the_librarys_class(tmp_path):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = accelerate(saelens("topk"))
    sae.save_model(tmp_path / "saved")
    loaded = SAE.load_from_disk(tmp_path / "saved")
    with torch.no_grad():
        close(loaded(data()), sae(data()), 1e-5)
    assert type(copy.deepcopy(sae)) is type(loaded)
    assert type(pickle.loads(pickle.dumps(learning("topk")))) is type(learning("topk"))
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
    gated = saes.GatedSAE(saes.GatedSAEConfig(d_in=D, d_sae=F))
    for one, name in ((gated, "sae_lens's GatedSAE"), (nn.Linear(2, 3), "torch's Linear"), (3, "builtins's int")):
        with pytest.raises(UserError, match=f"accelerate: {name} is not allowed"):
            accelerate(one)
    assert type(gated) is saes.GatedSAE
