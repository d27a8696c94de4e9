"""Dictionaries of parts: where each part acts, what it is given, and that nothing changes where it does nothing."""

import pytest
import torch
from temposae.engine import registry
from temposae.engine.composed import ComposedAutoencoder, dictionary
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.parts import Part, RowLayout, part
from temposae.engine.sae import BatchContext, SparseAutoencoder
from temposae.engine.stream import ActivationStream
from temposae.engine.sweep import resolve
from temposae.engine.train import train, train_together

D, F, T, N = 12, 40, 16, 64


@pytest.fixture
def kinds(monkeypatch):
    """Parts made for a test, forgotten afterwards."""
    registry.find("layer_norm")  # ours are known from here on
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))


@pytest.fixture
def nothing(kinds):
    """A part for each place that passes on what it gets."""
    for place in ("input", "pre", "acts", "latents"):
        method = {place: lambda self, value, seen: value}
        part(f"nothing_{place}")(type("Nothing", (Part,), method))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=generator), torch.arange(N) % T


def settings(*kinds: str, **more) -> SAEConfig:
    given = {"d_in": D, "d_sae": F, "k": 6, "activation": "relu", "mask": {"positions": T, "kind": "soft"}, "aux_k": 4}
    return SAEConfig(**(given | more), parts=[{"kind": kind} for kind in kinds])


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("place", ["input", "pre", "acts", "latents"])
def test_parts_that_do_nothing_leave_the_plain_dictionary(nothing, place, activation, assert_close):
    """Loss, every gradient, AuxK and codes, whichever way the activations go."""
    x, pos = batch()
    plain = SparseAutoencoder(settings(activation=activation))
    composed = dictionary(settings(f"nothing_{place}", activation=activation))
    dead = torch.arange(F) % 3 == 0
    found = [sae.objective(x, pos, T, None if activation == "relu" else dead) for sae in (plain, composed)]
    for one in found:
        one.loss.backward()
    assert found[0].loss.item() == pytest.approx(found[1].loss.item(), rel=1e-6)
    assert torch.equal(found[0].fired, found[1].fired)
    for name, parameter in plain.named_parameters():
        assert_close(dict(composed.named_parameters())[name].grad, parameter.grad, 1e-5)
    if activation == "batchtopk":
        assert torch.equal(found[0].least_kept, found[1].least_kept)
        for sae, one in zip((plain, composed), found, strict=True):
            sae.follow(one.least_kept)
    assert_close(composed.encode(x, pos), plain.encode(x, pos), 1e-6)
    assert composed.is_dense == (place != "input")


def test_parts_act_in_their_places_and_in_order(kinds):
    """x -> 2 x -> pre + 1 -> relu -> acts * 3 -> mask -> f + f^2, worked out by hand."""
    part("twice")(type("P", (Part,), {"input": lambda self, x, seen: 2 * x}))
    part("plus")(type("P", (Part,), {"pre": lambda self, pre, seen: pre + 1}))
    part("thrice")(type("P", (Part,), {"acts": lambda self, acts, seen: 3 * acts}))
    part("square")(type("P", (Part,), {"latents": lambda self, f, seen: f + f**2}))
    x, pos = batch()
    sae = dictionary(settings("square", "thrice", "plus", "twice"))
    acts = 3 * torch.relu((2 * x - sae.b_dec) @ sae.W_enc + sae.b_enc + 1)
    f = acts * sae.mask.weights()[pos]
    torch.testing.assert_close(sae.encode(x, pos), (f + f**2).detach(), rtol=1e-4, atol=1e-4)


def test_weights_and_penalties_make_the_loss(kinds):
    w, v = torch.rand(T), torch.rand(T)
    part("weights")(type("P", (Part,), {"weigh": lambda self, seen: (w, v)}))
    part("one_sided")(type("P", (Part,), {"weigh": lambda self, seen: (None, 2 * v)}))
    part("penalty")(type("P", (Part,), {"penalty": lambda self, seen: 0.5 * seen.sae.W_dec.abs().sum()}))
    x, pos = batch()
    sae = dictionary(settings("weights", "one_sided", "penalty", l1_coefficient=0.3))
    found = sae.objective(x, pos, T)
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.mask.weights()[pos]
    error = (x - f @ sae.W_dec - sae.b_dec).square().sum(1)
    loss = (w[pos] * error).sum() / N + 0.3 * (2 * v[pos] ** 2 * f.sum(1)).sum() / N + 0.5 * sae.W_dec.abs().sum()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert float(found.sums.squared_error.sum()) == pytest.approx(error.sum().item(), rel=1e-5)  # reports don't weigh


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_weights_by_position_on_the_sparse_way(kinds, activation):
    w = torch.rand(T)
    part("weights")(type("P", (Part,), {"weigh": lambda self, seen: (w, None)}))
    x, pos = batch()
    sae = dictionary(settings("weights", activation=activation))
    assert not sae.is_dense
    found = sae.objective(x, pos, T)
    assert found.loss.item() == pytest.approx((w * found.sums.squared_error).sum().item() / N, rel=1e-6)


def test_what_is_beside_a_batch_reaches_the_parts(kinds):
    seen_of = {}

    @part("look")
    class Look(Part):
        reads = frozenset({"rows", "attribute", "second", "f"})

        def penalty(self, seen):
            seen_of.update(vars(seen))
            seen_of["draws"] = [int(torch.randint(10**6, (), generator=seen.generator())) for _ in range(2)]
            return None

    x, pos = batch()
    batch_context = BatchContext(torch.arange(N) // T, (torch.arange(N) % 2), 2 * x)
    sae = dictionary(settings("look"))
    sae.at(0.25, step=7, seed=3)
    draws = []
    for _ in range(2):
        sae.objective(x, pos, T, batch_context=batch_context)
        draws.append(seen_of["draws"])
    assert draws[0] == draws[1]  # they follow from seed and step
    assert draws[0][0] != draws[0][1]
    assert (seen_of["progress"], seen_of["step"], seen_of["training"]) == (0.25, 7, True)
    assert torch.equal(seen_of["second"], 2 * x)
    assert torch.equal(seen_of["attribute"], torch.arange(N) % 2)
    assert seen_of["f"].shape == (N, F)
    assert seen_of["residual"].shape == (N, D)


def test_rows_are_found_and_undone():
    pos = torch.tensor([1, 2, 4, 0, 1, 2, 3, 1, 2])
    rows = RowLayout.of(pos)
    assert rows.number.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert rows.shape == (3, 5)
    value = torch.arange(1.0, 10.0)[:, None]
    spread = rows.spread(value)
    assert spread[..., 0].tolist() == [[0, 1, 2, 0, 3], [4, 5, 6, 7, 0], [0, 8, 9, 0, 0]]
    assert torch.equal(rows.kept, spread[..., 0] > 0)
    assert torch.equal(rows.gather(spread), value)
    with pytest.raises(UserError, match="9 tokens are not in the order of their rows"):
        RowLayout.of(pos.flip(0))


@pytest.fixture
def along_rows(kinds):
    @part("previous")
    class Previous(Part):
        """x of the token before, added."""

        reads = frozenset({"rows"})

        def input(self, x, seen):
            whole = seen.rows.spread(x)
            return x + seen.rows.gather(torch.nn.functional.pad(whole, (0, 0, 1, 0))[:, :-1])


def test_a_dictionary_that_looks_along_rows_needs_them(along_rows, stream_of, testbed):
    sae = SAEConfig(d_in=128, d_sae=64, parts=[{"kind": "previous"}])
    config = TrainConfig(tokens=2048, batch=512, control=False)
    with pytest.raises(UserError, match="stream.mode: tokens is not allowed with previous, which looks along rows"):
        train(stream_of(), sae, config)
    run = train(stream_of(mode="sequences"), sae, config)
    assert isinstance(run.sae, ComposedAutoencoder)
    assert run.sae.looks_along_rows


@pytest.mark.parametrize(
    ("stream", "sae", "train_", "message"),
    [
        ({}, {"parts": [{"kind": "other"}]}, {}, "stream.second: needed by other; give another hook"),
        ({"second": "blocks.0.hook_resid_post"}, {}, {}, "stream.second: .* is not allowed; no part"),
        ({}, {"parts": [{"kind": "idle"}]}, {"accumulate": 2}, "train.accumulate: 2 is not allowed with sae.parts"),
    ],
)
def test_what_parts_need_is_said(kinds, testbed, stream, sae, train_, message):
    part("other")(type("P", (Part,), {"reads": frozenset({"second"})}))
    part("idle")(type("P", (Part,), {}))
    run = RunConfig(
        stream=StreamConfig(**stream),
        sae=SAEConfig(d_in=128, d_sae=64, **sae),
        train=TrainConfig(tokens=1024, **train_),
    )
    hooks = ("blocks.1.hook_resid_post", *([stream["second"]] if stream else []))
    with pytest.raises(UserError, match=message):
        train_together(ActivationStream(StreamConfig(buffer_tokens=4096), model=testbed, hooks=hooks), {"one": run})
    testbed.use(layers=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "jumprelu"}, "sae.activation: jumprelu is not allowed with parts"),
        ({"d_out": 12}, "sae.d_out: 12 is not allowed with parts"),
        ({"activation": "topk", "prefixes": (8, F)}, "sae.prefixes: .* is not allowed with parts"),
    ],
)
def test_parts_go_with_few_kinds_of_dictionary(nothing, settings, message):
    with pytest.raises(UserError, match=message):
        SAEConfig(d_in=D, d_sae=F, k=4, parts=[{"kind": "nothing_acts"}], **settings)


def test_the_second_hook_is_the_layer_before_unless_given(kinds):
    part("other")(type("P", (Part,), {"reads": frozenset({"second"})}))
    sae = {"d_sae": 64, "parts": [{"kind": "other"}]}
    for layer, second in ((2, 1), (0, 1)):
        model, runs = resolve({"": {"stream": {"layer": layer}, "sae": sae}})
        assert runs[""].stream.second == f"blocks.{second}.hook_resid_post"
        assert set(model.widths) == {f"blocks.{layer}.hook_resid_post", f"blocks.{second}.hook_resid_post"}


def test_the_second_hook_s_activations_are_seen_and_are_not_the_target(kinds, testbed):
    looked = []

    @part("other")
    class Other(Part):
        reads = frozenset({"second"})

        def penalty(self, seen):
            looked.append((seen.x.clone(), seen.second.clone(), seen.target.clone()))
            return None

    hooks = ("blocks.1.hook_resid_post", "blocks.0.hook_resid_post")
    stream = ActivationStream(StreamConfig(buffer_tokens=4096, second=hooks[1]), model=testbed, hooks=hooks)
    run = RunConfig(
        stream=stream.config,
        sae=SAEConfig(d_in=128, d_sae=64, parts=[{"kind": "other"}]),
        train=TrainConfig(tokens=512, batch=512, control=False),
    )
    train_together(stream, {"one": run})
    again = ActivationStream(StreamConfig(buffer_tokens=4096), model=testbed, hooks=hooks).next(512)
    testbed.use(layers=[1])
    x, second, target = looked[0]
    scale = float(x[0, 0] / again.acts[hooks[0]][0, 0])
    torch.testing.assert_close(second, again.acts[hooks[1]].float() * scale)
    assert torch.equal(x, target)


def test_the_attribute_is_the_document_s_tone(stream_of):
    stream = stream_of()
    batch = stream.next(300)
    found = stream.attribute(batch)
    tones = [stream.text.language.document(int(number)).tone for number in batch.document]
    assert found.tolist() == tones
    assert 0 < sum(tones) < 300


def test_elsewhere_the_attribute_is_the_half_of_the_row(testbed, texts, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    stream = ActivationStream(StreamConfig(data=str(tmp_path / "text.txt"), buffer_tokens=4096), model=testbed)
    batch = stream.next(300)
    assert stream.attribute(batch).tolist() == [int(pos >= 64) for pos in batch.pos.tolist()]


def test_one_that_fails_is_named_and_left_out(kinds, testbed, tmp_path):
    @part("fails")
    class Fails(Part):
        def penalty(self, seen):
            if seen.step == 2:  # just after a report
                raise RuntimeError("the third step\nfails")
            return None

    def run(*kinds: str) -> RunConfig:
        sae = SAEConfig(d_in=128, d_sae=64, parts=[{"kind": kind} for kind in kinds])
        return RunConfig(sae=sae, train=TrainConfig(tokens=4096, batch=512, log_every_steps=2))

    stream = ActivationStream(StreamConfig(buffer_tokens=4096), model=testbed)
    found = train_together(stream, {"good": run(), "bad": run("fails")}, out=tmp_path / "runs")
    assert found["bad"].failed == "step 3: RuntimeError: the third step"
    assert found["good"].failed is None
    assert found["good"].metrics[-1]["step"] == 8
    with pytest.raises(RuntimeError, match="the third step"):
        train(ActivationStream(StreamConfig(buffer_tokens=4096), model=testbed), run("fails").sae, run().train)


def test_parts_of_other_packages_come_by_entry_points(kinds, monkeypatch):
    class Entry:
        name, module = "lab", "lab_parts"

        def load(self):
            part("theirs")(type("Theirs", (Part,), {"input": lambda self, x, seen: 3 * x}))

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "temposae.parts" else [])
    sae, plain = dictionary(settings("theirs")), SparseAutoencoder(settings())
    x, pos = batch()
    torch.testing.assert_close(sae.encode(x, pos), plain.encode(3 * x, pos))
