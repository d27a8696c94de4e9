"""Acceleration of other libraries' training: losses, parameters after steps, counts, trainers and optimisers as ever."""

import copy
from typing import Any

import pytest
import torch
from temposae import accelerate, accelerated, deaccelerate
from temposae.engine.accelerate import eligibility, is_accelerated
from temposae.engine.errors import UserError
from torch import Tensor

from .peers import LEARNING, D, F, K, N, coder, data, library, no_batch_is_too_small, saelens, trainer

pytestmark = pytest.mark.slow
COEFFICIENTS = {"l0": 0.2, "l1": 0.3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk training", {}),
    "batchtopk": ("batchtopk training", {}),
    "matryoshka": ("matryoshka training", {}),
    "matryoshka, levels' own AuxK": ("matryoshka training", {"use_matryoshka_aux_loss": True}),
    "standard": ("standard training", {}),
    "gated": ("gated training", {}),
    "jumprelu": ("jumprelu training", {}),
    "jumprelu, tanh": ("jumprelu training", {
        "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.01,
    }),
    "jumprelu, quadratic": ("jumprelu training", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def alike_every_time(monkeypatch):
    no_batch_is_too_small(monkeypatch)
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor, what: str = "") -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    size = expected.double().norm().clamp_min(1e-30)
    assert float((found.double() - expected.double()).norm() / size) <= 1e-5, what


def same_state(fast: Any, plain: Any) -> None:
    for (name, own), other in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
        close(other, own, name)


def own_code_is_left(monkeypatch: pytest.MonkeyPatch, obj: Any, name: str) -> None:
    """From here on the library's own method fails, and is not noticed as a replaced one."""
    monkeypatch.setattr(eligibility, "_is_the_librarys", lambda _: True)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} of the library was called")

    monkeypatch.setattr(type(obj).library_class, name, fail)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_of_saelens_are_the_same(kind, dead, monkeypatch):
    name, changes = KINDS[kind]
    step_input = library("sae_lens", "saes.sae").TrainStepInput
    mask = (torch.arange(F) % 4 == 0) if dead else None
    plain = saelens(name, **changes)
    expected, optimizer = [], torch.optim.Adam(plain.parameters(), lr=1e-2)
    fast = accelerate(copy.deepcopy(plain))
    for step in range(3):
        found = plain.training_forward_pass(step_input(data(step), COEFFICIENTS, mask, 0, False))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        expected.append((found, copy.deepcopy(plain.state_dict())))
    optimizer = torch.optim.Adam(fast.parameters(), lr=1e-2)
    whole = type(fast).library_class.encode_with_hidden_pre
    for step, (theirs, state) in enumerate(expected):
        own_code_is_left(monkeypatch, fast, "encode_with_hidden_pre")
        found = fast.training_forward_pass(step_input(data(step), COEFFICIENTS, mask, 0, False))
        monkeypatch.setattr(type(fast).library_class, "encode_with_hidden_pre", whole)
        assert list(found.losses) == list(theirs.losses)
        for what, loss in theirs.losses.items():
            close(found.losses[what].detach(), loss.detach(), what)
        close(found.loss.detach(), theirs.loss.detach())
        close(found.feature_acts.detach(), theirs.feature_acts.detach())
        if step == 0:  # worked out when asked for, with the parameters of then
            close(found.hidden_pre.detach(), theirs.hidden_pre.detach())
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        for what, own in state.items():
            close(fast.state_dict()[what], own, what)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_dead_latents_are_counted_without_auxk_where_the_library_does(kind):
    plain, fast = (trainer(kind, auxk_alpha=0.0) for _ in range(2))
    accelerate(fast)
    for one in (plain, fast):
        one.num_tokens_since_fired[::4] = one.dead_feature_threshold
        one.update(1, data())
    assert plain.dead_features == fast.dead_features


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("kind", LEARNING)
def test_updates_of_dictionary_learnings_trainers_are_the_same(kind, dead, monkeypatch):
    plain, fast = trainer(kind), accelerate(trainer(kind))
    assert is_accelerated(fast.ae)
    if dead and not hasattr(plain, "num_tokens_since_fired"):
        pytest.skip("counts none")
    states, losses = [], []
    fast.ae.load_state_dict(plain.ae.state_dict())
    for one in (plain, fast):
        if dead:
            one.num_tokens_since_fired[::4] = one.dead_feature_threshold
        if one is fast:
            own_code_is_left(monkeypatch, fast, "loss")
        for step in range(4):
            loss = one.update(step, data(step + 20))
            if one is plain:
                losses.append(loss)
                states.append(copy.deepcopy(one.ae.state_dict()))
                continue
            if loss is not None:
                assert loss == pytest.approx(losses[step], rel=1e-5)
            for name, own in states[step].items():
                close(fast.ae.state_dict()[name], own, f"{name} after step {step}")
    if hasattr(plain, "num_tokens_since_fired"):
        assert torch.equal(plain.num_tokens_since_fired, fast.num_tokens_since_fired)
        assert plain.dead_features == fast.dead_features
    deaccelerate(fast)
    assert type(fast) is type(plain)
    assert type(fast.ae) is type(plain.ae)
    assert type(fast.optimizer) is type(plain.optimizer)


def test_resampling_sees_the_same_idle_latents():
    plain, fast = (trainer("standard", resample_steps=50, warmup_steps=1) for _ in range(2))
    accelerate(fast)
    for one in (plain, fast):
        for step in range(1, 4):
            one.update(step, data(step + 20))
    assert plain.steps_since_active.any()
    assert torch.equal(plain.steps_since_active, fast.steps_since_active)


@pytest.mark.parametrize("kind", ["jumprelu", "standard", "gated"])
def test_where_many_latents_are_active_the_librarys_own_code_runs(kind, monkeypatch):
    """An untrained dictionary, half of whose latents are above 0."""
    sae = accelerate(saelens(f"{kind} training"))
    with torch.no_grad():
        (sae.b_gate if kind == "gated" else sae.b_enc).add_(10)
    own_code_is_left(monkeypatch, sae, "training_forward_pass")
    step_input = library("sae_lens", "saes.sae").TrainStepInput(data(), COEFFICIENTS, None, 0, False)
    with pytest.raises(AssertionError, match="training_forward_pass of the library"):
        sae.training_forward_pass(step_input)


def test_saelens_trainer_comes_with_its_dictionary_and_optimizer():
    library("sae_lens")
    from sae_lens import SAETrainer  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]

    def made() -> Any:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "total_training_samples": 6 * N,
            "train_batch_size_samples": N,
            "device": "cpu",
            "lr": 1e-2,
        }
        config = SAETrainerConfig(**settings, lr_end=1e-2, save_final_checkpoint=False)
        return SAETrainer(config, saelens("topk training"), data_provider=iter([data(i) for i in range(9)]))

    plain, fast = made(), accelerate(made())
    assert is_accelerated(fast.sae)
    assert is_accelerated(fast.optimizer)
    assert fast.optimizer.param_groups[0]["fused"]
    for one in (plain, fast):
        one.fit()
    same_state(fast.sae, plain.sae)
    close(fast.act_freq_scores, plain.act_freq_scores)
    deaccelerate(fast)
    assert not any(is_accelerated(part) for part in (fast, fast.sae, fast.optimizer))


def test_a_step_of_sparsify_is_the_same():
    plain = coder()
    fast = accelerate(copy.deepcopy(plain))
    for one in (plain, fast):
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        for step in range(3):
            one.set_decoder_norm_to_unit_norm()
            out = one(data(step), dead_mask=torch.arange(F) % 3 == 0)
            (out.fvu + out.auxk_loss / 32).backward()
            one.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
    same_state(fast, plain)


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_sparsifys_trainer_comes_with_its_coders(optimizer, tmp_path, monkeypatch, recwarn):
    sparsify = library("sparsify")
    monkeypatch.chdir(tmp_path)
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=D, n_layer=1, n_head=2))
    tokens = torch.randint(0, 50, (24, 16), generator=torch.Generator().manual_seed(5))

    def trained(fast: bool) -> Any:
        config = sparsify.TrainConfig(
            sparsify.SparseCoderConfig(num_latents=F, k=K), batch_size=8, hookpoints=["h.0"], optimizer=optimizer,
            log_to_wandb=False, save_every=10**6, lr=1e-3, lr_warmup_steps=1,
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
        found = sparsify.Trainer(config, rows, model)
        if fast:
            accelerate(found)
            assert all(is_accelerated(one) for one in found.saes.values())
        found.fit()
        return found

    plain, fast = trained(False), trained(True)
    same_state(fast.saes["h.0"], plain.saes["h.0"])
    named = [str(one.message) for one in recwarn if "accelerate" in str(one.message)]
    assert named == ([] if optimizer == "adam" else [
        "accelerate: ScheduleFreeWrapper is not accelerated; only Adam and AdamW are"
    ])  # fmt: skip
    deaccelerate(fast)
    assert not any(is_accelerated(one) for one in (fast, *fast.saes.values(), *fast.optimizers))


def test_autocast_in_training_goes_through_our_ops(monkeypatch):
    """As on a GPU in bfloat16."""
    expected, fast = trainer("topk").update(0, data()), accelerate(trainer("topk"))
    own_code_is_left(monkeypatch, fast, "loss")
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.update(0, data()) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_in_saelens_training_goes_through_our_ops(kind, monkeypatch):
    name, changes = KINDS[kind]
    step_input = library("sae_lens", "saes.sae").TrainStepInput(
        data(), COEFFICIENTS, torch.arange(F) % 4 == 0, 0, False
    )
    sae = saelens(name, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sae.training_forward_pass(step_input)
        fast = accelerate(sae)
        own_code_is_left(monkeypatch, fast, "encode_with_hidden_pre")
        found = fast.training_forward_pass(step_input)
    for what, loss in expected.losses.items():
        assert float(found.losses[what].detach()) == pytest.approx(float(loss.detach()), rel=2e-2), what
    assert found.feature_acts.dtype == expected.feature_acts.dtype
    assert found.sae_out.dtype == expected.sae_out.dtype
    found.loss.backward()
    assert all(p.grad is None or (p.grad.dtype == p.dtype and bool(p.grad.isfinite().all())) for p in fast.parameters())


def test_custom_settings_of_gradients_are_refused_whole():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))], differentiable=True, foreach=False)
    with pytest.raises(UserError, match="accelerate: Adam with differentiable is not allowed"), accelerated(adam):
        pass
    assert type(adam) is torch.optim.Adam
