"""Controls beside `random`: decoder rows stay near their start, encoders as they are, in training and in run folders."""

import pytest
import torch
from temposae.engine.cohort import Cohort
from temposae.engine.config import RunConfig, SAEConfig, TrainConfig
from temposae.engine.config.controls import CONTROLS, control_of
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.stream import Batch
from temposae.engine.train import train, train_together
from temposae.engine.training import directions
from temposae.engine.training.directions import LEAST_COSINE, hold_directions

from ..stepping import advance, stopped_after

SAE = SAEConfig(d_in=128, d_sae=96, k=4, aux_k=8)
OTHERS = ("soft_frozen", "frozen_encoder")
SETTINGS = TrainConfig(
    tokens=8000, batch=256, log_every_steps=5, checkpoint_every_steps=8, dead_after_tokens=2000, controls=OTHERS
)
ROUNDING = 1e-6


def cosines(rows, start):
    return (rows.detach().double() * start.detach().double()).sum(1)


def unit(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def whole(testbed_stream, tmp_path_factory):
    """An uninterrupted run with all controls, and its folder."""
    folder = tmp_path_factory.mktemp("controls") / "whole"
    return train(testbed_stream(), SAE, SETTINGS, out=folder), folder


@pytest.fixture(scope="module")
def testbed_stream(testbed):
    from temposae.engine.config import StreamConfig
    from temposae.engine.stream import ActivationStream

    testbed.use(layers=[1])
    return lambda: ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=16), model=testbed)


def test_rows_outside_move_to_the_nearest_unit_vector_with_the_cosine(monkeypatch):
    """Against the best of many unit vectors within reach, in float64; rows within reach keep their bits."""
    monkeypatch.setattr(directions, "ROWS", 7)
    start, rows = unit(40, 5), unit(40, 5, seed=1)
    rows[:20] = torch.nn.functional.normalize(start[:20] + 0.2 * rows[:20], dim=1)
    moved = rows.clone()
    hold_directions(moved, start)
    inside = cosines(rows, start) >= LEAST_COSINE
    assert 20 <= inside.sum() < 40
    assert torch.equal(moved[inside], rows[inside])
    outside = ~inside
    torch.testing.assert_close(moved[outside].norm(dim=1), torch.ones(int(outside.sum()), dtype=torch.float64))
    torch.testing.assert_close(
        cosines(moved, start)[outside], torch.full((int(outside.sum()),), LEAST_COSINE, dtype=torch.float64)
    )
    for row, end, center in zip(rows[outside], moved[outside], start[outside], strict=True):
        others = unit(20_000, 5, seed=2)
        others = others[others @ center >= LEAST_COSINE]
        assert len(others) > 200
        assert row @ end >= (others @ row).max()


def test_a_row_opposite_to_its_start_returns_to_it():
    start = torch.eye(3, 4)
    rows = -start
    hold_directions(rows, start)
    assert torch.equal(rows, start)


def test_an_update_that_was_skipped_moves_nothing():
    start, rows = unit(6, 5).float(), unit(6, 5, seed=1).float()
    kept = rows.clone()
    hold_directions(rows, start, skip=torch.tensor(True))
    assert torch.equal(rows, kept)
    shadow = torch.empty(6, 5, dtype=torch.bfloat16)
    hold_directions(rows, start, shadow, skip=torch.tensor(False))
    assert not torch.equal(rows, kept)
    assert torch.equal(shadow, rows.bfloat16())


def stepped(*, fused, control="soft_frozen", steps=8, lr=0.1, seed=1, dtype="float32", **sae):
    """A control after steps that turn decoder rows far, and what it began with."""
    config = control_of(SAEConfig(d_in=24, d_sae=37, k=5, **sae), control)
    settings = TrainConfig(tokens=6400, batch=64, lr=lr, warmup=0, dtype=dtype, seed=seed, dead_after_tokens=1)
    made = Learner(SparseAutoencoder(config, seed=seed), settings, torch.full((24,), 0.3), 4.0, 1)
    start = {name: tensor.clone() for name, tensor in made.sae.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(30, 24, generator=generator)
    batches = [Batch.of(torch.rand(64, 30, generator=generator).pow(8) @ basis, torch.zeros(64)) for _ in range(steps)]
    advance(made, *batches, fused=fused)
    return made, start


@pytest.mark.parametrize("fused", [False, True], ids=["autograd", "fused"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_decoder_rows_stay_within_reach_of_their_start(fused, activation, monkeypatch):
    made, start = stepped(fused=fused, activation=activation)
    cosine = cosines(made.sae.W_dec, start["W_dec"])
    assert cosine.min() >= LEAST_COSINE - ROUNDING
    assert (cosine < LEAST_COSINE + ROUNDING).any()  # the bound is reached
    torch.testing.assert_close(made.sae.W_dec.norm(dim=1), torch.ones(37))
    assert not torch.equal(made.sae.W_enc, start["W_enc"])
    for module in ("training.stacked_weights", "learner"):  # a dense relu dictionary takes its steps by autograd
        monkeypatch.setattr(f"temposae.engine.{module}.hold_directions", lambda *args, **options: None)
    free, _ = stepped(fused=fused, activation=activation)
    assert cosines(free.sae.W_dec, start["W_dec"]).min() < LEAST_COSINE - 0.05


def test_both_steps_hold_rows_alike(assert_close):
    one, two = (stepped(fused=fused, steps=2, lr=0.1)[0] for fused in (False, True))
    start = stepped(fused=False, steps=0)[1]["W_dec"]
    assert (cosines(one.sae.W_dec, start) < LEAST_COSINE + ROUNDING).sum() > 5
    for name, expected in one.sae.state_dict().items():
        assert_close(two.sae.state_dict()[name], expected, 1e-4, name)


def test_the_copy_in_half_precision_is_of_the_held_rows():
    config = control_of(SAEConfig(d_in=24, d_sae=37, k=5), "soft_frozen")
    made = Learner(
        SparseAutoencoder(config), TrainConfig(tokens=640, batch=64, lr=0.1, dtype="bfloat16"), torch.zeros(24), 4.0, 1
    )
    cohort = Cohort([made], fused=True)
    for seed in range(3):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))
        cohort.step(Batch.of(x, torch.zeros(64)))
    assert cohort.fused is not None
    assert torch.equal(cohort.fused.stacked.shadows["W_dec"], made.sae.W_dec.detach().bfloat16())
    assert (cosines(made.sae.W_dec, made.start) < LEAST_COSINE + ROUNDING).any()


@pytest.mark.parametrize("control", OTHERS)
def test_several_controls_take_their_steps_together(control):
    """In one cohort, each as alone."""
    alone = [stepped(fused=True, control=control, steps=3, seed=seed)[0] for seed in (1, 2)]
    fresh = [stepped(fused=True, control=control, steps=0, seed=seed)[0] for seed in (1, 2)]
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(30, 24, generator=generator)
    cohort = Cohort(fresh, fused=True)
    for _ in range(3):
        cohort.step(Batch.of(torch.rand(64, 30, generator=generator).pow(8) @ basis, torch.zeros(64)))
    cohort.settle()
    for one, other in zip(alone, fresh, strict=True):
        for name, expected in one.sae.state_dict().items():
            torch.testing.assert_close(other.sae.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("fused", [False, True], ids=["autograd", "fused"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_a_frozen_encoder_gives_the_same_activations_to_the_end(fused, activation):
    made, start = stepped(fused=fused, control="frozen_encoder", activation=activation)
    now = made.sae.state_dict()
    assert torch.equal(now["W_enc"], start["W_enc"])
    assert torch.equal(now["b_enc"], start["b_enc"]) == (activation != "relu")
    subtracted = start["b_dec"].double() @ start["W_enc"].double()  # what b_dec would have subtracted
    assert torch.equal(start["b_enc"], -subtracted.float())
    assert not torch.equal(now["W_dec"], start["W_dec"])
    assert not torch.equal(now["b_dec"], start["b_dec"])
    if activation == "topk":
        fresh = SparseAutoencoder(made.cfg)
        fresh.load_state_dict(start)
        x = torch.randn(50, 24, generator=torch.Generator().manual_seed(5))
        assert torch.equal(made.sae.encode(x), fresh.encode(x))
    free, _ = stepped(fused=fused, control="random", activation=activation)
    assert not torch.equal(free.sae.W_enc, start["W_enc"])


@pytest.mark.parametrize("control", OTHERS)
def test_resampling_leaves_what_is_frozen(control):
    config = control_of(SAEConfig(d_in=24, d_sae=37, activation="relu"), control)
    settings = TrainConfig(tokens=6400, batch=64, dead_after_tokens=1, resample_every_steps=2)
    made = Learner(SparseAutoencoder(config), settings, torch.zeros(24), 4.0, 1)
    start = {name: tensor.clone() for name, tensor in made.sae.state_dict().items()}
    with torch.no_grad():
        made.leaves["b_enc"][:20] = -1000
    made.counts.idle_tokens[:, :20] = 10**6
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    advance(made, Batch.of(x, torch.zeros(64)), Batch.of(x, torch.zeros(64)))
    if control == "frozen_encoder":
        assert torch.equal(made.sae.W_enc, start["W_enc"])
    else:
        assert not torch.allclose(made.sae.W_dec[:20], start["W_dec"][:20], atol=0.1)  # resampled
        assert cosines(made.sae.W_dec, start["W_dec"]).min() >= LEAST_COSINE - ROUNDING


def test_a_run_has_the_controls_that_it_names(whole):
    run, folder = whole
    last = checkpoint.find(folder)
    assert last.dictionaries == ["sae", *CONTROLS]
    assert list(run.controls) == list(CONTROLS)
    assert run.controls["random"] is run.random
    fresh = SparseAutoencoder(SAE, seed=SETTINGS.seed)
    soft, frozen = run.controls["soft_frozen"], run.controls["frozen_encoder"]
    assert cosines(soft.W_dec, fresh.W_dec).min() >= LEAST_COSINE - ROUNDING
    assert cosines(run.sae.W_dec, fresh.W_dec).min() < LEAST_COSINE
    assert torch.equal(frozen.W_enc, fresh.W_enc)
    assert not torch.equal(frozen.W_dec, fresh.W_dec)
    fvu = {name: line["fvu"] for name, line in run.metrics[-1].items() if name in CONTROLS}
    assert fvu["soft_frozen"] < fvu["random"]
    assert run.metrics[-1]["fvu"] < min(fvu.values())
    for name, sae in run.controls.items():
        loaded = last.dictionary(name)
        assert loaded.cfg == sae.cfg == control_of(SAE, name)
        for key, value in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


def test_the_dictionary_and_random_are_as_without_other_controls(whole, testbed_stream):
    run, _ = whole
    plain = train(testbed_stream(), SAE, SETTINGS.model_copy(update={"controls": ()}))
    assert list(plain.controls) == ["random"]
    for name in ("sae", "random"):
        for key, value in plain.dictionaries[name].state_dict().items():
            assert torch.equal(run.dictionaries[name].state_dict()[key], value)


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_a_stopped_run_resumes_exactly(whole, testbed_stream, tmp_path, steps):
    run, folder = whole
    with stopped_after(steps):
        train(testbed_stream(), SAE, SETTINGS, out=tmp_path / "half")
    resumed = train(testbed_stream(), SAE, SETTINGS, out=tmp_path / "half", resume=True)
    for name, sae in run.dictionaries.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, resumed.dictionaries[name].state_dict()[key]), (name, key)
    expected, found = (checkpoint.find(f).tensors("state") for f in (folder, tmp_path / "half"))
    assert torch.equal(expected["soft_frozen.start"], SparseAutoencoder(SAE, seed=SETTINGS.seed).W_dec)
    assert all(torch.equal(expected[key], found[key]) for key in expected | found)
    lines = [[{name: line[name] for name in CONTROLS} for line in read_metrics(f)] for f in (folder, tmp_path / "half")]
    assert lines[0] == lines[1]


def test_the_start_comes_from_the_checkpoint(whole, testbed_stream):
    """Not from the seed: another version of torch may draw other numbers."""
    last = checkpoint.find(whole[1])
    prefix = "soft_frozen."
    state = {k.removeprefix(prefix): v for k, v in last.tensors("state").items() if k.startswith(prefix)}
    made = Learner(SparseAutoencoder(control_of(SAE, "soft_frozen"), seed=99), SETTINGS, torch.zeros(128), 8.0, 128)
    state["sums.count"] = state["sums.count"][:128]
    made.load_state(state, last.tensors("soft_frozen"))
    assert torch.equal(made.start, SparseAutoencoder(SAE, seed=SETTINGS.seed).W_dec)


def test_many_dictionaries_have_their_controls_on_one_stream(testbed_stream, tmp_path):
    stream = testbed_stream()
    settings = SETTINGS.model_copy(update={"tokens": 2000})
    several = {
        "a": RunConfig(stream=stream.config, sae=SAE, train=settings),
        "b": RunConfig(stream=stream.config, sae=SAE, train=settings.model_copy(update={"seed": 1, "control": False})),
        "c": RunConfig(stream=stream.config, sae=SAE.model_copy(update={"decoder": "random"}), train=settings),
    }
    runs = train_together(stream, several, out=tmp_path / "several")
    assert [list(run.controls) for run in runs.values()] == [list(CONTROLS), list(OTHERS), []]
    assert runs["b"].random is None
    alone = train(testbed_stream(), SAE, settings)
    for name, sae in alone.dictionaries.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(runs["a"].dictionaries[name].state_dict()[key], value), (name, key)


def test_settings_that_do_not_go_together_are_refused():
    parts = ({"kind": "position_embedding"},)
    with pytest.raises(
        UserError, match=r"^train.controls: frozen_encoder is not allowed with sae.parts \(position_emb"
    ):
        RunConfig(sae=SAE.model_copy(update={"parts": parts}), train=SETTINGS)
    with pytest.raises(
        UserError, match=r"controls: \['soft_frozen', 'soft_frozen'\] is not allowed; each must be named once"
    ):
        TrainConfig(controls=("soft_frozen", "soft_frozen"))
    with pytest.raises(UserError, match="controls"):
        TrainConfig(controls=("softly",))
    with pytest.raises(UserError, match="encoder: random is not allowed with apply_b_dec_to_input: true"):
        SAEConfig(d_in=8, d_sae=16, k=2, encoder="random")
    SAEConfig(d_in=8, d_sae=16, k=2, encoder="random", d_out=8)
    with pytest.raises(UserError, match="is not allowed with parts"):
        SAEConfig(d_in=8, d_sae=16, k=2, encoder="random", parts=parts)
