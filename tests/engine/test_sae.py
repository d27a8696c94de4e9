"""The dictionary against its formulas, written out in float64."""

import copy

import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import Batch
from temposae.engine.training.schedules import schedule
from temposae.kernels.masks import weights_at

from ..stepping import advance

D, F, K, T, N = 10, 36, 5, 8, 50


def make(seed: int = 0, **settings) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(**{"d_in": D, "d_sae": F, "k": K, **settings}), seed=seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # away from the symmetric start
        sae.W_enc += 0.3 * torch.randn(D, F, generator=generator)
        sae.b_enc += 0.3 * torch.randn(F, generator=generator)
        sae.b_dec += torch.randn(D, generator=generator)
    return sae


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(N, D, generator=generator), torch.randint(0, T, (N,), generator=generator)


def by_formula(sae: SparseAutoencoder, x, pos, dead=None):
    """(loss, parameters) in float64, plain autograd over dense tensors."""
    p = {name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()}
    x, cfg = x.double(), sae.cfg
    mask = torch.ones(T, F, dtype=torch.float64)
    if cfg.mask.kind == "soft":
        mask = torch.sigmoid(p["mask.logits"] / cfg.mask.temperature)
    elif cfg.mask.kind != "none":
        mask = weights_at(sae.mask.weights(), torch.arange(T)).double()
    acts = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * mask[pos]
    if cfg.activation == "jumprelu":
        # straight-through: what is inside the rectangle moves with the threshold
        pre, theta = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]), p["threshold"]
        width = cfg.bandwidth * D**0.5
        inside, moved = ((pre - theta).abs() < width / 2).double(), theta - theta.detach()
        jump = (pre > theta).double()
        f = mask[pos] * (pre * jump - moved * theta.detach() / width * inside)
        l0 = ((mask[pos] != 0) * (jump - moved / width * inside)).sum()
        e = x - f @ p["W_dec"] - p["b_dec"]
        return (e.square().sum() + cfg.l0_coefficient * D * l0) / N, p
    if cfg.activation == "relu":
        e = x - acts @ p["W_dec"] - p["b_dec"]
        return (e.square().sum() + cfg.l1_coefficient * acts.sum()) / N, p
    if cfg.activation == "batchtopk":
        chosen = torch.zeros_like(acts).flatten().scatter(0, acts.flatten().topk(N * K).indices, 1.0).view_as(acts)
        f = chosen * acts
    else:
        f = torch.zeros_like(acts).scatter(1, acts.topk(K).indices, 1.0) * acts
    loss = torch.zeros(())
    for end in cfg.prefixes or [F]:
        e = x - f[:, :end] @ p["W_dec"][:end] - p["b_dec"]
        loss = loss + e.square().sum() / N / len(cfg.prefixes or [F])
    if dead is not None:
        among = acts * dead
        chosen = torch.zeros_like(acts).scatter(1, among.topk(cfg.aux_k).indices, 1.0) * among
        target = e.detach()
        left = (target - chosen @ p["W_dec"]).square().sum()
        variance = [(v - v.mean(0)).square().sum() for v in (x, target)]
        loss = loss + cfg.aux_coefficient * left / variance[1] * variance[0] / N
    return loss, p


JUMP = {"activation": "jumprelu", "initial_threshold": 0.3, "bandwidth": 0.2, "l0_coefficient": 0.05}
CASES = {
    "topk": {},
    "topk, random mask": {"mask": MaskConfig(kind="random", positions=T)},
    "topk, soft mask": {"mask": MaskConfig(kind="soft", positions=T, temperature=0.7)},
    "topk, gaussian mask": {"mask": MaskConfig(kind="gaussian", positions=T)},
    "topk, auxk": {"aux_k": 4},
    "topk, auxk, soft mask": {"aux_k": 4, "mask": MaskConfig(kind="soft", positions=T)},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk, auxk, soft mask": {
        "activation": "batchtopk",
        "aux_k": 4,
        "mask": MaskConfig(kind="soft", positions=T),
    },
    "jumprelu": JUMP,
    "jumprelu, random mask": JUMP | {"mask": MaskConfig(kind="random", positions=T)},
    "jumprelu, soft mask": JUMP | {"mask": MaskConfig(kind="soft", positions=T)},
    "relu": {"activation": "relu"},
    "relu, soft mask": {"activation": "relu", "mask": MaskConfig(kind="soft", positions=T)},
    "frozen decoder": {"decoder": "random"},
    "matryoshka": {"prefixes": (F // 4, F // 2, F)},
    "matryoshka batchtopk, auxk, soft mask": {
        "activation": "batchtopk",
        "prefixes": (3, F),
        "aux_k": 4,
        "mask": MaskConfig(kind="soft", positions=T),
    },
}


THROUGH_TRITON = ("topk", "topk, auxk", "batchtopk", "jumprelu", "frozen decoder")


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, "torch") for case in CASES]
    + [pytest.param(case, "triton", marks=() if case in THROUGH_TRITON else pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients_equal_the_formula(case, backend, assert_close, monkeypatch):
    monkeypatch.setenv("TEMPOSAE_BACKEND", backend)
    sae, (x, pos) = make(**CASES[case]), data()
    dead = (torch.arange(F) % 3 == 0) if "auxk" in case else None
    found = sae.objective(x, pos, T, dead)
    found.loss.backward()
    expected, parameters = by_formula(sae, x, pos, dead)
    expected.backward()
    assert_close(found.loss, expected, name="loss")
    for name, parameter in sae.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert_close(parameter.grad, parameters[name].grad, name=name)


def test_jumprelu_thresholds_start_where_4k_activations_exceed_them():
    sae, (x, pos) = make(activation="jumprelu", k=2), data()
    sae.initialise_threshold(x, pos)
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    for rounding in (-1e-5, 0, 1e-5):  # none lies so close to it that its rounding decides
        assert int((pre * (1 + rounding) > sae.threshold).sum()) == N * 4 * 2
    given = make(activation="jumprelu", initial_threshold=0.3)
    given.initialise_threshold(x, pos)
    assert torch.allclose(given.threshold, torch.tensor(0.3 * D**0.5))


def test_batchtopk_keeps_what_exceeds_its_threshold_after_training():
    sae, (x, pos) = make(activation="batchtopk"), data()
    assert sae.objective(x, pos, T).sums.l0.sum() == N * K
    least = sae.objective(x, pos, T).least_kept
    sae.follow(least)
    assert sae.threshold == least
    code = sae.encode_sparse(x)
    assert code.l0().sum() in (N * K - 1, N * K)  # the least itself is not above the threshold
    assert code.l0().max() > K > code.l0().min()
    sae.follow(least + 1)
    assert torch.allclose(sae.threshold, least + 0.01)
    sae.follow(torch.tensor(torch.inf))  # nothing was kept
    assert torch.allclose(sae.threshold, least + 0.01)


def test_auxk_reaches_encoder_and_decoder_of_dead_latents():
    sae, (x, pos) = make(aux_k=4), data()
    with torch.no_grad():
        sae.b_enc[:6] -= 3  # rarely positive, never among the K largest
    before = sae.objective(x, pos, T).fired
    dead = ~before
    assert dead.any()
    sae.objective(x, pos, T, dead).loss.backward()
    assert sae.W_enc.grad[:, dead].abs().max() > 0
    assert sae.W_dec.grad[dead].abs().max() > 0
    sae.zero_grad()
    sae.objective(x, pos, T).loss.backward()
    assert sae.W_enc.grad[:, dead].abs().max() == 0


def test_encode_decode_and_forward_agree():
    for settings in ({}, {"activation": "relu"}, JUMP):
        sae, (x, _) = make(**settings), data()
        f = sae.encode(x)
        pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        if sae.cfg.activation == "jumprelu":
            pre = pre * (pre > sae.threshold)
        if sae.cfg.activation == "topk":
            assert ((f > 0).sum(1) <= K).all()
            assert torch.allclose(f.sum(1), pre.topk(K).values.sum(1), rtol=1e-5)
        else:
            assert torch.allclose(f, pre, atol=1e-6)
        x_hat = f @ sae.W_dec + sae.b_dec
        assert torch.allclose(sae(x), x_hat, atol=1e-5)
        assert torch.allclose(sae.decode(f), sae.decode(sae.encode_sparse(x)), atol=1e-5)
        assert sae(x.view(5, 10, D)).shape == (5, 10, D)
        assert sae.encode(x.view(5, 10, D)).shape == (5, 10, F)
    with pytest.raises(UserError, match="width 3 is not allowed; .* d_in = 10"):
        sae(torch.zeros(4, 3))


SEEN = ("topk", "topk, soft mask", "batchtopk", "jumprelu, soft mask", "relu", "relu, soft mask", "matryoshka")


@pytest.mark.parametrize("case", SEEN)
def test_encode_and_forward_carry_gradients_of_their_formula(case, assert_close):
    """What is active is a constant: gradients are those of relu(...) * mask at the active entries."""
    sae, (x, pos) = make(**CASES[case]), data()
    if sae.cfg.activation == "batchtopk":
        sae.threshold.fill_(1.0)
    weight = torch.randn(N, F, generator=torch.Generator().manual_seed(5))
    toward = torch.randn(N, D, generator=torch.Generator().manual_seed(6))
    p = {name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()}
    mask = torch.sigmoid(p["mask.logits"] / sae.cfg.mask.temperature)[pos] if "soft" in case else 1.0
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    active = sae.encode(x, pos).detach() > 0
    f = torch.relu((wide - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * mask * active
    expected = (f * weight).sum() + ((f @ p["W_dec"] + p["b_dec"]) * toward).sum()
    found = (sae.encode(narrow, pos) * weight).sum() + (sae(narrow, pos) * toward).sum()
    assert_close(found, expected, name="value")
    found.backward()
    expected.backward()
    assert_close(narrow.grad, wide.grad, name="x")
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            assert_close(parameter.grad, p[name].grad, name=name)
    with torch.no_grad():
        assert not sae(x, pos).requires_grad
        assert not sae.encode(x, pos).requires_grad


def test_parameters_start_tied_unit_norm_and_latent_major():
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=K))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F))
    assert sae.W_enc.T.is_contiguous()
    assert sae.W_dec.is_contiguous()
    for other in (copy.deepcopy(sae), sae.float()):
        assert other.W_enc.T.is_contiguous()


def test_scaling_is_exact_for_powers_of_two():
    sae, (x, _) = make(), data()
    f, x_hat, before = sae.encode(x), sae(x), copy.deepcopy(sae.state_dict())
    sae.scale_(0.25)
    assert torch.equal(sae.encode(0.25 * x), 0.25 * f)
    assert torch.equal(sae(0.25 * x), 0.25 * x_hat)
    sae.scale_(4)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


def learner(**settings) -> Learner:
    x, _ = data()
    config = TrainConfig(tokens=N * 20, batch=N, lr=1e-2, dead_after_tokens=2 * N, **settings)
    return Learner(make(aux_k=4), config, x.mean(0), float(x.norm(dim=1).mean()), T)


def batch() -> Batch:
    x, pos = data()
    return Batch.of(x.bfloat16(), pos)


def test_decoder_rows_stay_unit_and_their_gradient_orthogonal():
    one = learner()
    advance(one, batch())
    assert torch.allclose(one.sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    sae, (x, pos) = make(), data()
    sae.constrain()
    sae.objective(x, pos, T).loss.backward()
    assert ((sae.W_dec.grad * sae.W_dec).sum(1)).abs().max() > 1
    sae.project_decoder_gradient()
    assert ((sae.W_dec.grad * sae.W_dec).sum(1)).abs().max() < 1e-5


def test_bias_starts_at_the_mean_and_scale_is_a_power_of_two():
    x, _ = data()
    one = learner()
    assert torch.equal(one.sae.b_dec, x.mean(0) * one.scale)
    assert 0.7 < one.scale * float(x.norm(dim=1).mean()) / D**0.5 < 1.42


def test_dead_latents_are_counted_in_tokens():
    one = learner()
    fires = one.sae.objective(batch().x.float() * one.scale, batch().pos, T).fired
    never = int((~fires).nonzero()[0])
    with torch.no_grad():
        one.sae.b_enc[never] = -1e4
    advance(one, batch())
    assert int(one.counts.idle_tokens[0, never]) == N
    assert int(one.counts.idle_tokens[0, fires].min()) == 0
    assert one.report()["dead"] == 0
    advance(one, batch())
    assert one.report()["dead"] >= 1  # 2 N tokens without it
    assert one.any_dead


def test_the_gradient_is_clipped_to_the_norm_told():
    free, clipped, used_freely = learner(clip_norm=None), learner(clip_norm=1e-3), None
    for one in (free, clipped):
        advance(one, batch())
        used = torch.stack([m.exp_avg.norm() for m in one.moments().values()]).norm() / (1 - one.config.beta1)
        assert (used <= 1.01e-3) == (one is clipped)
        used_freely = used if one is free else used_freely
    assert clipped.report()["gradient_norm"] == pytest.approx(float(used_freely), rel=1e-4)  # what it was before
    assert "gradient_norm" not in free.report()


def test_schedule_rises_holds_and_falls():
    factors = [schedule(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.05)
    assert [schedule(step, 5, 0, 0) for step in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 37}, r"sae.k: 37 is not allowed; it must be at most d_sae \(36\)"),
        ({"k": 0}, "sae.k: 0 is not allowed"),
        ({"l1_coefficient": -0.1}, "sae.l1_coefficient: -0.1 is not allowed"),
        ({"l1_coefficient": float("nan")}, "sae.l1_coefficient: nan is not allowed"),
        ({"aux_coefficient": float("inf")}, "sae.aux_coefficient: inf is not allowed"),
        (
            {"activation": "gelu"},
            "sae.activation: 'gelu' is not allowed; it must be topk, batchtopk, relu, or jumprelu",
        ),
        ({"activation": "jumprelu", "bandwidth": 0}, "sae.bandwidth: 0 is not allowed"),
        ({"activation": "jumprelu", "initial_threshold": -1}, "sae.initial_threshold: -1 is not allowed"),
        ({"activation": "jumprelu", "l0_coefficient": -1}, "sae.l0_coefficient: -1 is not allowed"),
        ({"activation": "batchtopk", "k": 37}, r"sae.k: 37 is not allowed; it must be at most d_sae"),
        ({"aux": 3}, "sae.aux: no such setting; did you mean aux_k"),
        ({"mask": {"kind": "ranges", "ranges": 9, "positions": 8}}, "sae.mask.ranges: 9 is not allowed"),
        ({"mask": {"temperature": 0}}, "sae.mask.temperature: 0 is not allowed"),
    ],
    ids=str,
)
def test_wrong_settings_name_field_value_and_what_is_allowed(settings, message):
    with pytest.raises(UserError, match=message) as error:
        SAEConfig(**{"d_in": D, "d_sae": F, "k": K, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["fp8", 8, None])
def test_moments_of_no_known_kind_are_named(value):
    allowed = "it must be float32, bfloat16, or 8bit"
    with pytest.raises(UserError, match=f"^train.moments: {value!r} is not allowed; {allowed}$"):
        TrainConfig(moments=value)
