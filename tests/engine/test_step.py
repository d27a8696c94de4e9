"""The fused step against autograd, clip_grad_norm_ and torch's Adam, step after step."""

import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, TrainConfig
from temposae.engine.optim import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.step import FusedStep
from temposae.engine.stream import Batch

D, T, N, STEPS = 24, 6, 16, 2
CASES = {
    "plain": dict(),
    "unclipped": dict(clip_norm=None),
    "with AuxK": dict(aux_k=5),
    "ranges": dict(mask=MaskConfig(kind="ranges", ranges=3, positions=T)),
    "random mask and AuxK": dict(mask=MaskConfig(kind="random", positions=T), aux_k=7),
    "batchtopk and AuxK": dict(activation="batchtopk", aux_k=5),
    "gaussian": dict(mask=MaskConfig(kind="gaussian", positions=T)),
    "random decoder": dict(decoder="random"),
    "soft mask and AuxK": dict(mask=MaskConfig(kind="soft", positions=T, temperature=0.5), aux_k=5),
    "jumprelu": dict(activation="jumprelu", l0_coefficient=0.01),
    "jumprelu, soft mask": dict(activation="jumprelu", l0_coefficient=0.01, mask=MaskConfig(kind="soft", positions=T)),
    "jumprelu, ranges": dict(activation="jumprelu", mask=MaskConfig(kind="ranges", ranges=3, positions=T)),
    "matryoshka and AuxK": dict(prefixes=(5, 11, 37), aux_k=5),
    "matryoshka batchtopk, ranges": dict(
        activation="batchtopk", prefixes=(5, 11, 37), mask=MaskConfig(kind="ranges", ranges=3, positions=T)
    ),
    "relu": dict(activation="relu"),
    "relu, soft mask": dict(activation="relu", mask=MaskConfig(kind="soft", positions=T)),
}

THROUGH_TRITON = (
    "plain", "random mask and AuxK", "batchtopk and AuxK", "jumprelu, soft mask", "relu", "matryoshka and AuxK"
)  # fmt: skip


def learner(changes, dtype="float32"):
    changes = dict(changes)
    # A gradient norm of about 5: clipped to 1, so that clipping is tried too.
    training = dict(
        clip_norm=changes.pop("clip_norm", 1.0), tokens=100 * N, batch=N, dead_after_tokens=1, lr=0.01, dtype=dtype
    )
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=37, k=5, **changes), seed=1)
    mean = torch.randn(D, generator=torch.Generator().manual_seed(2))
    made = Learner(sae, TrainConfig(**training), mean, 4.0, T)
    made.any_dead = "aux_k" in changes
    made.l0 = 0.3  # few enough for a relu dictionary to take the sparse path
    return made


def fused_step(made, dtype=torch.float32):
    return FusedStep(made.sae, made.moments(), made.paces, made.config, dtype)


def batches():
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(30, D, generator=generator)
    for _ in range(STEPS):
        x = torch.rand(N, 30, generator=generator).pow(8) @ directions
        yield Batch(x, torch.randint(0, T, (N,), generator=generator), torch.zeros(N).int(), torch.zeros(N).int())


def after_training(made):
    for batch in batches():
        made.step(batch)
    return made.sae.state_dict(), made.state(), made.report()


@pytest.mark.parametrize(
    ("changes", "backend"),
    [pytest.param(case, "torch", id=f"{name}-torch") for name, case in CASES.items()]
    + [pytest.param(CASES[name], "triton", id=f"{name}-triton") for name in THROUGH_TRITON],
)
def test_equals_the_unfused_step(changes, backend, monkeypatch, poisoned, assert_close):
    if backend == "triton":
        pytest.importorskip("triton")
    reference = learner(changes)
    assert reference.fused is None
    start = {name: tensor.clone() for name, tensor in reference.sae.state_dict().items()}
    weights, state, report = after_training(reference)

    monkeypatch.setenv("TEMPOSAE_BACKEND", backend)
    fused = learner(changes)
    assert (fused.fused is not None) == (backend == "triton")
    fused.fused = fused_step(fused)
    fused_weights, fused_state, fused_report = after_training(fused)

    for name, expected in weights.items():
        if expected.dtype.is_floating_point:
            assert_close(fused_weights[name] - start[name], expected - start[name], 1e-4, f"change of {name}")
    assert fused_state.keys() == state.keys()
    for name, expected in state.items():
        assert_close(fused_state[name], expected, 1e-4, name)
    assert fused_report == pytest.approx(report, rel=1e-4)
    assert (report["aux_loss"] > 0) == ("aux_k" in changes)
    assert report.get("gradient_norm", 3) > 2
    assert ("gradient_norm" in report) == (changes.get("clip_norm", 1) is not None)


def test_goes_on_from_a_checkpoint_of_the_other_step(monkeypatch, assert_close):
    """State and weights of the unfused step load into the fused one, and the next steps agree."""
    first = learner({})
    after_training(first)
    first.sae.scale_(1 / first.scale)
    weights, state = first.sae.state_dict(), first.state()
    weights, state = ({name: tensor.clone() for name, tensor in d.items()} for d in (weights, state))
    results = []
    for fused in (False, True):
        made = learner({})
        if fused:
            made.fused = fused_step(made)
        made.load_state(state, weights)
        results.append(after_training(made)[0])
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, name=name)


def test_copies_in_half_precision_follow_the_weights():
    made = learner({}, dtype="bfloat16")
    made.fused = fused_step(made, torch.bfloat16)
    for batch in batches():
        made.step(batch)
    for weight, shadow in made.fused._shadows.items():
        assert torch.equal(shadow, weight.detach().bfloat16())
        assert shadow.stride() == weight.stride()


def test_a_relu_dictionary_is_dense_until_few_latents_are_active():
    """The two paths meet at a report, and what the sparse one trains in half precision has not fallen behind."""
    made = learner(dict(activation="relu"), dtype="bfloat16")
    made.fused = fused_step(made, torch.bfloat16)
    taken = []
    made.fused.run = lambda *args: taken.append(made.steps_done) or FusedStep.run(made.fused, *args)
    made.l0 = float(made.sae.cfg.d_sae)
    batch = next(batches())
    made.step(batch)
    assert made.report()["l0"] > 1
    with torch.no_grad():
        made.sae.b_enc -= 100
    made.step(batch)
    assert taken == []
    assert made.report()["l0"] == 0
    for weight, shadow in made.fused._shadows.items():
        assert torch.equal(shadow, weight.detach().bfloat16())
    made.step(batch)
    assert taken == [2]
    resumed = learner(dict(activation="relu"), dtype="bfloat16")
    resumed.load_state(made.state(), made.sae.state_dict())
    assert resumed.l0 == made.l0
