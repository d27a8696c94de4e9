"""The race: everyone gets the same tokens, takes turns, is checked for learning, and is left out without harm."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from temposae.bench import libraries, providers, step
from temposae.bench.data import HEADLINE, PRESETS, Shape, shapes, tokens
from temposae.bench.floors import step_floors
from temposae.bench.providers import PROVIDERS, Provider
from temposae.bench.step import Contender, contenders, measure
from temposae.bench.timing import Memory
from temposae.bench.torch_baseline import Dense
from temposae.bench.training_job import ACTIVATIONS, DEAD, ProviderRun, ProviderUnavailable, TrainingJob, sae_config
from temposae.engine.errors import UserError

from ..stepping import advance

SHAPE = Shape(N=64, D=16, F=48, K=4)
PACKAGES = {
    f"{name}{how}": package
    for name, package in (
        ("eai-sparsify", "sparsify"), ("SAELens", "sae_lens"), ("dictionary_learning", "dictionary_learning")
    )
    for how in ("", ", accelerated")
}  # fmt: skip
BUILT_IN = ("temposae", "torch")


def job(shape: Shape = SHAPE, **changes: Any) -> TrainingJob:
    return TrainingJob(shape, "cpu", "fp32", 3e-3, tokens(shape, "cpu", torch.float32))._replace(**changes)


def installed(name: str) -> None:
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")


every_kind = pytest.mark.parametrize(
    ("activation", "auxk"),
    [*((activation, False) for activation in ACTIVATIONS), ("topk", True), ("batchtopk", True)],
)


def fvu(trainee: ProviderRun, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((x - trainee.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())


# --- tokens


def test_tokens_have_structure_and_are_the_same_every_time() -> None:
    shape = Shape(N=2048, D=32, F=64, K=4)
    a, b = (tokens(shape, "cpu", torch.bfloat16, count=2) for _ in range(2))
    assert torch.equal(a.batches[1].x, b.batches[1].x)
    assert not torch.equal(a.wide[0], a.wide[1])
    assert a.batches[0].x.dtype == torch.bfloat16
    assert torch.equal(a.batches[0].x.float(), a.wide[0])
    assert a.mean_norm == pytest.approx(32**0.5, rel=0.1)
    # the few common directions stand out: 64 equally common ones would reach 3, white noise 1.3
    spectrum = torch.linalg.eigvalsh(a.wide[0].T.cov())
    assert spectrum[-1] / spectrum.mean() > 3.8


# --- providers


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *((name, False) for name in BUILT_IN),
        *(pytest.param(name, own, marks=pytest.mark.slow) for name in PACKAGES for own in (False, True)),
        pytest.param("torch.compile", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@every_kind
def test_every_provider_learns(name: str, own: bool, activation: str, auxk: bool) -> None:
    """On data with structure; the one that doesn't learn would be the fastest of all."""
    installed(name)
    if activation not in PROVIDERS[name].activations:
        pytest.skip(f"{name} has no {activation}")
    given = job(own=own, activation=activation, auxk=auxk)
    trainee = PROVIDERS[name].build(given)
    start = fvu(trainee, given.tokens.held_out)
    for i in range(60):
        trainee.step(i)
    # schedule-free averages, warm-ups and small rates of their own make for smaller steps
    assert fvu(trainee, given.tokens.held_out) < (0.999 if own else 0.85) * start
    l0 = None if trainee.l0 is None else trainee.l0(given.tokens.held_out)
    assert (l0 is None) == (activation in ("topk", "batchtopk"))
    assert l0 is None or 0 < l0 < SHAPE.F
    assert (trainee.aux_k > 0) == auxk


@every_kind
def test_temposae_and_plain_torch_are_the_same_training(activation: str, auxk: bool) -> None:
    """Same start, same loss, same projection and optimiser, written twice: the weights must stay together."""
    given = job(activation=activation, auxk=auxk)
    ours, plain = (PROVIDERS[name].build(given) for name in BUILT_IN)
    x = given.tokens.held_out
    for i in range(5):
        ours.step(i)
        plain.step(i)
        assert fvu(ours, x) == pytest.approx(fvu(plain, x), rel=1e-3)
    assert ours.aux_k == plain.aux_k == (SHAPE.D // 2 if auxk else 0)
    if ours.l0 is not None and plain.l0 is not None:
        assert ours.l0(x) == pytest.approx(plain.l0(x), abs=0.1)


@pytest.mark.parametrize("auxk", [False, True])
def test_dead_latents_learn_by_auxk_alone(auxk: bool) -> None:
    given = job(auxk=True)
    learner = providers.make_learner(given)
    dead = torch.zeros(SHAPE.F, dtype=torch.bool)
    dead[DEAD] = True
    learner.any_dead = auxk
    learner.counts.idle_tokens[:, dead] = learner.dead_after
    before = learner.sae.W_enc.detach().clone()
    advance(learner, given.tokens.batches[0])
    moved = (learner.sae.W_enc.detach() - before).abs().amax(0)
    assert bool(moved[~dead].max() > 0)
    assert bool((moved[dead] > 0).any()) == auxk


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("eai-sparsify", "sparsify.SparseCoder.forward"),
        ("SAELens", "sae_lens.TopKTrainingSAE.calculate_topk_aux_loss"),
        ("dictionary_learning", "get_auxiliary_loss"),
    ],
)
def test_auxk_of_the_libraries_has_work(
    name: str, place: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step their own code finds dead latents, and a loss that isn't zero."""
    installed(name)
    if activation not in PROVIDERS[name].activations:
        pytest.skip(f"{name} has no {activation}")
    if name == "dictionary_learning":
        libraries.skip_init(name, unless="nnsight")
        trainer = {"topk": "top_k.TopKTrainer", "batchtopk": "batch_top_k.BatchTopKTrainer"}[activation]
        place = f"dictionary_learning.trainers.{trainer}.{place}"
    given = job(activation=activation, auxk=True)
    trainee = PROVIDERS[name].build(given)
    owner, method = place.rsplit(".", 1)
    module, cls = owner.rsplit(".", 1)
    original = getattr(getattr(libraries.load(module), cls), method)
    losses: list[float] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        losses.append(float(getattr(found, "auxk_loss", found).detach()))
        return found

    monkeypatch.setattr(getattr(libraries.load(module), cls), method, watched)
    for i in range(4):
        trainee.step(i)
    assert len(losses) == 4
    assert min(losses) > 0


def test_clipping_reaches_those_who_leave_the_choice() -> None:
    for name in BUILT_IN:
        assert PROVIDERS[name].build(job(clip=0.5)).clip == 0.5
        assert PROVIDERS[name].build(job()).clip is None
    assert PROVIDERS["temposae"].build(job(own=True)).clip == 1.0


def test_decoder_rows_of_plain_torch_keep_unit_norm() -> None:
    trainee = PROVIDERS["torch"].build(job())
    for i in range(3):
        trainee.step(i)
    assert isinstance(trainee.reconstruct, Dense)
    assert trainee.reconstruct.W_dec.detach().norm(dim=1).tolist() == pytest.approx([1.0] * SHAPE.F, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipping_limits_the_gradient(clip: float | None) -> None:
    trainee = PROVIDERS["torch"].build(job(clip=clip))
    trainee.step(0)
    assert isinstance(trainee.reconstruct, Dense)
    norm = torch.stack([p.grad.norm() for p in trainee.reconstruct.parameters() if p.grad is not None]).norm()
    assert (norm <= 0.5001) == (clip is not None)


def test_dense_gradient_is_tangent_to_the_decoder() -> None:
    sae = Dense(sae_config(job()), "cpu")
    sae.loss(torch.randn(SHAPE.N, SHAPE.D)).backward()
    sae.project()
    assert sae.W_dec.grad is not None
    assert float((sae.W_dec.grad * sae.W_dec).detach().sum(1).abs().max()) < 1e-5


def test_a_missing_package_is_absent_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(ProviderUnavailable, match="^sparsify is not installed$"):
        PROVIDERS["eai-sparsify"].build(job())


# --- the race


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, made_up_rates: Any) -> Callable[..., list[str]]:
    """stub(a=..., b=...): replaces the providers by ones of no work, or by functions that build; gives the log of steps."""

    def replace(**made: Callable[[TrainingJob], ProviderRun] | None) -> list[str]:
        log: list[str] = []

        def nothing(name: str) -> Callable[[TrainingJob], ProviderRun]:
            return lambda given: ProviderRun(lambda i: log.append(f"{name}{i}"), lambda x: 0 * x, "Adam", "fp32", None)

        table = {name: Provider(build or nothing(name), True, "torch") for name, build in made.items()}
        monkeypatch.setattr(step, "PROVIDERS", table)
        monkeypatch.setattr(step, "memory", lambda call, device: (call(), Memory(0, 0)))  # a second each
        return log

    return replace


def race(
    *names: str, own: bool = False, rounds: int = 3, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    entrants = contenders(names, own)
    return measure([SHAPE], entrants, device="cpu", dtype="fp32", rounds=rounds, **settings)


def test_everyone_takes_turns_on_the_same_batches(stub: Callable[..., list[str]]) -> None:
    log = stub(a=None, b=None)
    cases, left_out = race("a", "b")
    assert left_out == {}
    assert log == ["a0", "a1", "b0", "b1", "a2", "b2", "a3", "b3", "a4", "b4"]  # two to warm up, then in turn
    assert [(case["provider"], case["samples"], case["steps"]) for case in cases] == [("a", 3, 5), ("b", 3, 5)]


def test_who_does_not_learn_is_found_out(stub: Callable[..., list[str]]) -> None:
    stub(idle=None, temposae=providers.temposae)
    cases, _ = race("idle", "temposae", rounds=20)
    assert {case["provider"]: case["loss_falls"] for case in cases} == {"idle": False, "temposae": True}


def test_a_case_holds_all_that_the_tables_need(made_up_rates: Any) -> None:
    cases, _ = race("temposae", own=True)
    assert [case["settings"] for case in cases] == ["headline", "own"]
    assert [case["clip"] for case in cases] == [None, 1.0]  # the defaults clip
    case = cases[0]
    expected = dict(
        op="train_step", activation="topk", dtype="fp32", optimizer="Adam", clip=None, auxk=0, N=64, D=16, F=48, K=4
    )
    assert case.items() >= expected.items()
    floors = step_floors(*SHAPE, rates=made_up_rates, itemsize=4)
    assert case["floor_ms"] == min(floors.fused, floors.dense)
    assert 0 < case["ms_p20"] <= case["ms"] <= case["ms_p80"]
    # weights, both moments and gradients at least, and no more than a few times that at so small a size
    assert 4 * 4 * 2 * SHAPE.D * SHAPE.F < case["peak_bytes"] < 40 * 4 * 2 * SHAPE.D * SHAPE.F


def test_each_activation_is_a_race_of_its_own(made_up_rates: Any) -> None:
    cases, left_out = race("temposae", "eai-sparsify", activations=["batchtopk", "relu"], rounds=1)
    assert [(case["provider"], case["activation"]) for case in cases] == [
        ("temposae", "batchtopk"),
        ("temposae", "relu"),
    ]
    assert left_out == {
        "eai-sparsify, batchtopk": "it has no batchtopk",
        "eai-sparsify, relu": "it has no relu",
    }
    assert [case["auxk"] for case in cases] == [0, 0]
    assert cases[0]["l0"] is None
    l0 = cases[1]["l0"]
    assert SHAPE.K < l0 < SHAPE.F
    n, d, f, _ = SHAPE
    for case, kept in zip(cases, (SHAPE.K, l0), strict=True):
        floors = step_floors(n, d, f, kept, rates=made_up_rates, itemsize=4)
        assert case["floor_ms"] == min(floors.fused, floors.dense)


def test_a_case_with_auxk_says_how_many_latents_take_part(made_up_rates: Any) -> None:
    (case,), _ = race("temposae", rounds=1, auxk=True)
    assert (case["activation"], case["auxk"]) == ("topk", SHAPE.D // 2)
    n, d, f, k = SHAPE
    floors = step_floors(n, d, f, k + SHAPE.D // 2, rates=made_up_rates, itemsize=4)
    assert case["floors"] == floors._asdict()
    assert case["floor_ms"] == min(floors.fused, floors.dense)


def test_several_dictionaries_are_so_many_steps(made_up_rates: Any, stub: Callable[..., list[str]]) -> None:
    """Of ours they go together, of the others one after another; the floor is that of all."""
    (one,), _ = race("temposae", rounds=1)
    cases, _ = race("temposae", rounds=1, dictionaries=3)
    assert [case["dictionaries"] for case in (one, *cases)] == [1, 3]
    assert cases[0]["floor_ms"] == pytest.approx(3 * one["floor_ms"])
    assert cases[0]["flops"] == pytest.approx(3 * one["flops"])
    assert cases[0]["loss_falls"]
    with pytest.raises(UserError, match="^dictionaries: 0 is not allowed; it must be at least 1"):
        race("temposae", dictionaries=0)
    log = stub(temposae=None, peer=None)
    race("temposae", "peer", rounds=1, dictionaries=2)
    warm = ["temposae0", "temposae1", "peer0", "peer0", "peer1", "peer1"]
    assert log == [*warm, "temposae2", "peer2", "peer2"]


def test_a_broken_peer_is_left_out_and_a_broken_temposae_is_not(stub: Callable[..., list[str]]) -> None:
    def broken(given: TrainingJob) -> ProviderRun:
        raise RuntimeError("no such kernel\nsecond line")

    stub(a=None, bad=broken, temposae=broken)
    cases, left_out = race("bad", "a")
    assert [case["provider"] for case in cases] == ["a"]
    assert left_out == {f"bad at {SHAPE}": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        race("temposae", "a")


def test_who_breaks_only_when_raced_is_left_out(stub: Callable[..., list[str]]) -> None:
    def late(given: TrainingJob) -> ProviderRun:
        def take(i: int) -> None:
            if i > 2:
                raise ValueError("out of luck")

        return ProviderRun(take, lambda x: 0 * x, "Adam", "fp32", None)

    stub(late=late, a=None)
    cases, left_out = race("late", "a")
    assert [(case["provider"], case["samples"]) for case in cases] == [("a", 3)]
    assert left_out == {f"late at {SHAPE}": "ValueError: out of luck"}


def test_who_does_not_fit_beside_the_others_runs_later(
    stub: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with room for one: b finds it taken by a, until a's race is over and its memory given back."""
    taken: list[str] = []

    def large(name: str) -> Callable[[TrainingJob], ProviderRun]:
        def build(given: TrainingJob) -> ProviderRun:
            if taken:
                raise torch.OutOfMemoryError("CUDA out of memory")
            taken.append(name)
            return ProviderRun(lambda i: log.append(f"{name}{i}"), lambda x: 0 * x, "Adam", "fp32", None)

        return build

    log: list[str] = []
    stub(a=large("a"), b=large("b"))
    monkeypatch.setattr(step, "_release", lambda device: taken.clear() if "a4" in log else None)
    cases, left_out = race("a", "b")
    assert [(case["provider"], case["heat"]) for case in cases] == [("a", 0), ("b", 1)]
    assert log == [f"{name}{i}" for name in "ab" for i in range(5)]
    assert left_out == {}


def test_what_never_fits_is_left_out(stub: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    stub(a=None)
    monkeypatch.setattr(step, "free_bytes", lambda device: 1000.0)
    cases, left_out = race("a")
    assert cases == []
    assert "GiB" in left_out[f"a at {SHAPE}"]


# --- mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: contenders(["temposea"], False), ("provider: 'temposea'", "temposae, eai-sparsify")),
        (lambda: race("temposae", rounds=0), ("rounds: 0", "at least 1")),
        (lambda: race("temposae", activations=["topkk"]), ("activation: 'topkk'", "topk, batchtopk, jumprelu, relu")),
        (lambda: race("temposae", activations=["relu"], auxk=True), ("auxk", "activation relu", "topk and batchtopk")),
        (lambda: measure([SHAPE], [], device="cpu", dtype="fp16"), ("dtype: 'fp16'", "fp32, bf16")),
        (lambda: measure([Shape(4, 4, 4, 5)], [], device="cpu", dtype="fp32"), ("K: 5", "at most F (4)")),
        (lambda: shapes("gpuu"), ("preset: 'gpuu'", "tiny, cpu, gpu, sweep")),
        (lambda: shapes("cpu", N="12,many"), ("N: '12,many'", "numbers, separated by commas")),
        (lambda: shapes("cpu", D="0"), ("D: 0", "at least 1")),
    ],
)
def test_mistakes_get_one_line(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_shapes_are_a_preset_or_every_combination_of_what_is_given() -> None:
    assert shapes("cpu", N=None, F=None) == PRESETS["cpu"]
    assert shapes("tiny", N="8,16", D=None, F="64", K=None) == [Shape(8, 64, 64, 8), Shape(16, 64, 64, 8)]
    swept = PRESETS["sweep"]
    assert {shape.F for shape in swept} == {2**power for power in range(14, 21)}
    assert {shape.D for shape in swept} == {768, 2304, 3584, 4096}
    assert {shape.N for shape in swept} == {2**power for power in range(10, 16)}
    assert {shape.K for shape in swept} == {2**power for power in range(4, 9)}
    assert len(set(swept)) == len(swept)
    # one size at a time, so that each shows what it alone does
    assert all(sum(a != b for a, b in zip(shape, HEADLINE, strict=True)) <= 1 for shape in swept)


def test_contenders_come_once_and_by_their_own_defaults_where_those_differ() -> None:
    wanted = [Contender("torch", False), Contender("temposae", False), Contender("temposae", True)]
    assert contenders(["torch", "temposae", "torch"], own=True) == wanted
