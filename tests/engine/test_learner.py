"""What training can do beside its plain steps: schedules, parts of a batch, other beginnings, a second life for the dead."""

import pandas
import pytest
import torch
from temposae.engine.config import MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import HELD_OUT, read_metrics
from temposae.engine.stream import ActivationStream, Batch
from temposae.engine.stream.center import center
from temposae.engine.train import train
from temposae.engine.training.schedules import annealed
from temposae.evals import features
from temposae.evals.run_evals import evaluate

from ..stepping import advance

D, F, T, N = 16, 64, 5, 96
SETTINGS = dict(tokens=40 * N, batch=N, lr=1e-2, dead_after_tokens=4 * N)


def batches(count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=draw), dim=1)
    found = []
    for _ in range(count):
        strength = torch.rand(N, 40, generator=draw) * (torch.rand(N, 40, generator=draw) < 0.08)
        found.append(Batch.of(3 * strength @ directions + 0.2, torch.randint(0, T, (N,), generator=draw)))
    return found


def learner(activation: str = "topk", sae: dict | None = None, **settings) -> Learner:
    config = SAEConfig(**({"d_in": D, "d_sae": F, "k": 4, "aux_k": 8, "activation": activation} | (sae or {})))
    x = torch.cat([batch.x for batch in batches(4)])
    training = TrainConfig(**(SETTINGS | settings))
    return Learner(SparseAutoencoder(config, seed=1), training, x.mean(0), float(x.norm(dim=1).mean()), T)


def after(one: Learner, count: int = 6) -> dict[str, torch.Tensor]:
    for batch in batches(count):
        advance(one, batch)
    return {name: value.clone() for name, value in one.sae.state_dict().items()}


def test_k_goes_down_in_sixteen_steps():
    ks = [annealed(step, 1000, 0.2, 40, 8) for step in range(1000)]
    assert ks[0] == 40
    assert ks[199] > 8
    assert set(ks[200:]) == {8}
    assert ks == sorted(ks, reverse=True)
    assert len(set(ks)) == 17
    assert [annealed(step, 10, 0.0, 40, 8) for step in range(3)] == [40, 8, 8]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_training_keeps_as_many_as_the_schedule_says(activation):
    one = learner(activation, k_start=32, k_anneal=0.5)
    l0 = []
    for batch in batches(24):
        advance(one, batch)
        l0.append(one.report()["l0"])
    assert l0[0] > 12
    assert max(l0[20:]) <= 4.01
    assert one.sae.k == one.sae.cfg.k == 4


@pytest.mark.parametrize(("activation", "name"), [("relu", "l1_coefficient"), ("jumprelu", "l0_coefficient")])
def test_sparsity_is_asked_for_gradually(activation, name):
    """As long as the factor is small, a large coefficient changes little; at its end the loss has all of it."""

    def losses(**settings) -> list[float]:
        one = learner(activation, {name: 5.0}, **settings)
        return [advance(one, batch) or one.report()["loss"] for batch in batches(12)]

    plain, gradual = losses(), losses(sparsity_warmup=0.25)
    assert gradual[0] < 0.5 * plain[0]
    one = learner(activation, {name: 5.0}, sparsity_warmup=0.25)
    factors = []
    for batch in batches(12):
        advance(one, batch)
        factors.append(one.sae.pressure)
    assert factors == pytest.approx([min(1, (step + 1) / 10) for step in range(12)])


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_is_the_batch(activation, parts, assert_close):
    whole, apart = learner(activation), learner(activation, accumulate=parts)
    whole.any_dead = apart.any_dead = False
    for name, value in after(whole).items():
        assert_close(after(learner(activation, accumulate=parts))[name], value, 1e-3, name)
    after(apart)
    one, two = whole.report(), apart.report()
    assert one == pytest.approx(two, rel=1e-3)


def test_the_geometric_median_is_where_distances_are_least():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=draw) + 3
    x[:50] += 1000
    found = center(x, "geometric_median")

    def distances(y: torch.Tensor) -> float:
        return float((x.double() - y.double()).norm(dim=1).sum())

    for _ in range(20):
        assert distances(found) <= distances(found + 0.01 * torch.randn(6, generator=draw)) + 1e-3
    assert (found - 3).norm() < 0.5
    assert (center(x, "mean") - 3).norm() > 100
    assert torch.equal(center(x, "zero"), torch.zeros(6))
    assert center(torch.ones(9, 3), "geometric_median") == pytest.approx(torch.ones(3))


@pytest.mark.parametrize("bias", ["mean", "geometric_median", "zero"])
def test_b_dec_starts_from_what_is_asked_for(stream_of, bias):
    stream = stream_of()
    x = stream.sample().x.float()
    sae, settings = (
        SAEConfig(d_in=128, d_sae=64, k=4),
        TrainConfig(tokens=256, batch=256, lr=1e-9, bias=bias, control=False),
    )
    found = train(stream, sae, settings).sae.b_dec.detach()
    assert found == pytest.approx(center(x, bias), rel=1e-3, abs=1e-4)


def test_dead_latents_of_a_relu_dictionary_begin_again():
    def dead_at_end(**settings) -> tuple[float, Learner]:
        one = learner("relu", {"l1_coefficient": 0.01}, **settings)
        one.sae.b_enc.data[: F // 2] = -100.0
        after(one, 30)
        return one.report()["dead_fraction"], one

    without, _ = dead_at_end()
    assert without >= 0.5
    with_it, one = dead_at_end(resample_every_steps=8)
    assert with_it < 0.1
    assert (one.sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    again = dead_at_end(resample_every_steps=8)[1]
    assert all(torch.equal(value, again.sae.state_dict()[name]) for name, value in one.sae.state_dict().items())


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_new_life_begins_without_memories(moments):
    one = learner("relu", moments=moments, resample_every_steps=10)
    one.sae.b_enc.data[3] = -100.0
    for batch in batches(9):
        advance(one, batch)
    before = one.sae.W_dec[3].clone()
    advance(one, batches(10)[9])
    assert int(one.counts.idle_tokens[0, 3]) == 0
    for name in ("W_enc", "W_dec", "b_enc"):
        assert all(not m[3].any() for m in one.moments()[name][:2])
        assert one.moments()[name].exp_avg[5].any()
    assert not torch.equal(one.sae.W_dec[3], before)
    assert float(one.sae.b_enc.detach()[3]) == 0
    W_enc = one.sae.W_enc.detach().T
    alive = (one.counts.idle_tokens[0] < one.dead_after) & (torch.arange(F) != 3)
    assert W_enc[3].norm() == pytest.approx(0.2 * float(W_enc[alive].norm(dim=1).mean()), rel=0.05)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_fine_tuning_begins_with_the_weights_of_a_run(stream_of, tmp_path, activation):
    sae = SAEConfig(d_in=128, d_sae=64, k=4, activation=activation)
    first = train(stream_of(), sae, TrainConfig(tokens=8192, batch=256, control=False), out=tmp_path / "run")
    still = dict(tokens=256, batch=256, lr=1e-12, init=str(tmp_path / "run"))
    again = train(stream_of(), sae, TrainConfig(**still), out=tmp_path / "tuned")
    for name, value in first.sae.state_dict().items():
        limit = 1e-2 if name == "threshold" else 1e-5
        assert (again.sae.state_dict()[name] - value).norm() <= limit * value.norm(), name
    assert again.metrics[0]["fvu"] < 1.3 * first.metrics[-1]["fvu"]
    assert again.random is not None
    assert again.metrics[0]["random"]["fvu"] > 2 * again.metrics[0]["fvu"]  # the control is a new one
    assert checkpoint.find(tmp_path / "tuned").run.train.init == str(tmp_path / "run")
    for other, message in (
        ({"d_sae": 96}, "its d_sae is 64, and sae.d_sae 96"),
        ({"mask": MaskConfig(kind="ranges")}, "its mask is"),
    ):
        with pytest.raises(UserError, match=f"train.init: .* is not allowed; {message}"):
            train(stream_of(), sae.model_copy(update=other), TrainConfig(**still))
    with pytest.raises(UserError, match="nowhere does not exist"):
        train(stream_of(), sae, TrainConfig(**(still | {"init": "nowhere"})))


@pytest.mark.parametrize(
    ("sae", "training", "message"),
    [
        ({}, {"k_start": 2}, r"train.k_start: 2 is not allowed; it must be between k \(4\) and d_sae \(64\)"),
        (
            {"activation": "relu"},
            {"k_start": 8},
            "train.k_start: 8 is not allowed with relu; it is for topk or batchtopk",
        ),
        ({}, {"resample_every_steps": 8}, "train.resample_every_steps: 8 is not allowed with topk; it is for relu"),
        ({}, {"accumulate": 5}, r"train.accumulate: 5 is not allowed; it must divide batch \(256\)"),
        ({}, {"bias": "middle"}, "train.bias: 'middle' is not allowed"),
    ],
)
def test_what_does_not_go_together_is_named(sae, training, message):
    with pytest.raises(UserError, match=message):
        RunConfig(sae=SAEConfig(**({"d_in": D, "d_sae": F, "k": 4} | sae)), train=TrainConfig(batch=256, **training))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("prefixes", [None, (20, F)])
def test_a_transcoder_s_loss_and_gradients_are_those_of_its_formula(activation, prefixes, assert_close):
    """Against autograd in float64, from the latents that it kept."""
    if prefixes is not None and activation not in ("topk", "batchtopk"):
        return
    out, draw = 7, torch.Generator().manual_seed(5)
    x = torch.cat([batch.x for batch in batches(1)])
    target = torch.randn(N, out, generator=draw)
    config = SAEConfig(
        d_in=D, d_sae=F, d_out=out, k=4, aux_k=0, activation=activation, prefixes=prefixes, initial_threshold=0.05
    )
    sae = SparseAutoencoder(config, seed=2)
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.b_dec.shape) == ((D, F), (F, out), (out,))
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    sae.b_dec.data.normal_(generator=draw)
    found = sae.objective(x, torch.zeros(N, dtype=torch.long), 1, target=target)
    found.loss.backward()
    wide = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    pre = (x.double() @ wide["W_enc"] + wide["b_enc"]).relu()
    with torch.no_grad():
        kept = sae.encode_sparse(x).to_dense() > 0
        if activation == "batchtopk":
            kept = pre >= pre.flatten().topk(4 * N).values[-1]
    f = pre * kept
    losses = []
    for end in prefixes or (F,):
        losses.append((target - f[:, :end] @ wide["W_dec"][:end] - wide["b_dec"]).square().sum() / N)
    loss = torch.stack(losses).mean()
    if activation == "relu":
        loss = loss + config.l1_coefficient * f.sum() / N
    if activation == "jumprelu":
        loss = loss + config.l0_coefficient * D * kept.sum() / N
    loss.backward()
    assert_close(found.loss, loss)
    for name, p in wide.items():
        if name != "threshold":
            assert_close(sae.get_parameter(name).grad, p.grad, 1e-5, name)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_transcoder_learns_what_an_mlp_does(testbed, tmp_path, activation):
    """From what enters the MLP of a layer to what leaves it; saved, loaded, resumed and measured like a dictionary."""
    hook, target = "blocks.1.ln2.hook_in", "blocks.1.hook_mlp_out"
    stream = ActivationStream(
        StreamConfig(hook=hook, target=target, buffer_tokens=4096), model=testbed, hooks=(hook, target)
    )
    sae = SAEConfig(d_in=128, d_out=128, d_sae=256, k=16, activation=activation)
    run = train(stream, sae, TrainConfig(tokens=20_000, batch=512, lr=2e-3, log_every_steps=10), out=tmp_path / "run")
    assert run.metrics[-1]["fvu"] < 0.5 * run.metrics[0]["fvu"]
    batch = stream.next(512)
    y, y_hat = batch.acts[target].float(), run.sae(batch.acts[hook].float()).detach()
    fvu = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(run.metrics[-1]["fvu"], rel=0.3)
    again = checkpoint.load(tmp_path / "run")
    assert torch.equal(again(batch.acts[hook].float()), y_hat)
    result = evaluate(checkpoint.find(tmp_path / "run"), stream, None)["core"]
    assert result["explained_variance"] == pytest.approx(1 - float(fvu), abs=0.1)
    assert 0.5 < result["ce_recovered"] <= 1.001
    assert result["controls"]["mean"]["explained_variance"] == pytest.approx(0, abs=1e-6)
    text = stream.text.next(4)
    stream.text.counts["rows"] -= 4  # they are read again
    features.encode(checkpoint.find(tmp_path / "run"), stream, tmp_path / "store", tokens=300)
    acts = {name: value[stream.read(text)[1]][:300] for name, value in stream.model.harvest(text.tokens).items()}
    stored = pandas.read_parquet(tmp_path / "store" / "tokens.parquet")
    error = (acts[target] - run.sae(acts[hook]).detach()).square().sum(1)
    assert stored["squared_error"].to_numpy() == pytest.approx(error.numpy(), rel=1e-4)
    testbed.use(layers=[1])


def test_a_transcoder_needs_both_its_ends(testbed):
    hook, target = "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"
    stream = ActivationStream(StreamConfig(hook=hook, target=target), model=testbed, hooks=(hook, target))
    plain = ActivationStream(StreamConfig(hook=hook), model=testbed, hooks=(hook,))
    for where, sae, message in (
        (stream, {}, "sae.d_out: None is not allowed; a transcoder has both"),
        (plain, {"d_out": 128}, "sae.d_out: 128 is not allowed; a transcoder has both"),
        (stream, {"d_out": 64}, "sae.d_out: 64 is not allowed; blocks.2.hook_mlp_out of testbed has width 128"),
    ):
        with pytest.raises(UserError, match=message):
            train(where, SAEConfig(d_in=128, d_sae=64, k=4, **sae))
    with pytest.raises(UserError, match=f"stream.target: {hook} is not allowed; it must differ from hook"):
        StreamConfig(hook=hook, target=hook)
    testbed.use(layers=[1])


@pytest.mark.parametrize("activation", [pytest.param("relu", marks=pytest.mark.slow), "jumprelu"])
def test_sparsity_finds_the_l0_that_is_asked_for(activation):
    steps, found = 400, {}
    for target in (None, 3, 9):
        one = learner(activation, tokens=steps * N, lr=2e-2, target_l0=target, clip_norm=None)
        given = batches(20)
        for step in range(steps):
            advance(one, given[step % len(given)])
            if step == steps - 60:
                one.report()
        found[target] = one.report()["l0"]
    assert found[3] == pytest.approx(3, rel=0.2)
    assert found[9] == pytest.approx(9, rel=0.2)
    assert min(abs(found[None] / target - 1) for target in (3, 9)) > 0.2


def test_what_sparsity_has_become_is_resumed():
    settings = dict(target_l0=5, tokens=40 * N)
    whole = learner("relu", **settings)
    after(whole, 6)
    state, weights = ({k: v.clone() for k, v in held.items()} for held in (whole.state(), whole.weights()))
    other = learner("relu", **settings)
    other.load_state(state, weights)
    for one in (whole, other):
        for batch in batches(9)[6:]:
            advance(one, batch)
    assert whole.report() == other.report()
    assert torch.equal(whole.sae.W_enc, other.sae.W_enc)
    assert float(whole.matching[0]) > 0


def test_scores_on_rows_that_training_never_sees(stream_of, tmp_path):
    """From the beginning on, the same as the dictionary itself gives on these rows; a run that goes on has them once."""
    stream = stream_of()
    config = TrainConfig(tokens=4096, batch=512, lr=3e-3, control=False, log_every_steps=4, held_out_rows=8)
    run = train(stream, SAEConfig(d_in=128, d_sae=96, k=8), config, out=tmp_path / "run")
    lines = read_metrics(tmp_path / "run", name=HELD_OUT)
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[0]["fvu"] > lines[1]["fvu"] > lines[2]["fvu"]
    text = next(iter(stream.text.held_out(8, 8)))
    kept = stream.read(text)[1]
    x, pos = stream.model.activations(text.tokens)[kept], kept.nonzero()[:, 1]
    error = (x - run.sae(x, pos)).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert lines[2]["fvu"] == pytest.approx(float(error), rel=1e-5)
    assert lines[2]["l0"] == pytest.approx(8, abs=0.1)
    train(
        stream_of(),
        SAEConfig(d_in=128, d_sae=96, k=8),
        config.model_copy(update={"held_out_rows": 0}),
        out=tmp_path / "no",
    )
    assert not (tmp_path / "no" / HELD_OUT).exists()
