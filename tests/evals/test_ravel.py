"""RAVEL with a model whose attributes are coordinates of its own, and prompts from files."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import TokenRows
from temposae.engine.testbed.language import Language, facts
from temposae.evals import ravel as module
from temposae.evals import suite
from temposae.evals.entity_facts import NO_FACTS, Prompts, file_prompts, language_prompts
from temposae.evals.evaluation import LABELLED, Evaluation
from temposae.evals.ravel import _frozen, _pairs, ravel

ENTITIES, VALUES, PLACES = 16, 4, 3
NAMES = (("toys", "colour"), ("toys", "shape"))
D = 2 * VALUES + 2  # the colour, the shape, and which of the two is asked for


def value(entity: torch.Tensor, attribute: int) -> torch.Tensor:
    return entity % VALUES if attribute == 0 else entity // VALUES % VALUES


def states(tokens: torch.Tensor) -> torch.Tensor:
    """x [B, T, D], zero but for the last token. The tokens of a prompt are an entity, nothing, and an attribute."""
    x = torch.zeros(*tokens.shape, D)
    one_hot = torch.nn.functional.one_hot
    entity, attribute = tokens[:, 0], tokens[:, PLACES - 1]
    parts = [one_hot(value(entity, a), VALUES) for a in range(2)]
    x[:, PLACES - 1] = torch.cat([*parts, one_hot(attribute, 2)], 1).float()
    return x


class Bridge(torch.nn.Module):
    """Answers with the colour or the shape that x says, as x asks."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(10.0))
        self.hooks: list[str] = []

    def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: Any) -> torch.Tensor:
        ((name, put),) = fwd_hooks
        self.hooks.append(name)
        return self.head(put(states(tokens), None))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat(
            [x[..., a * VALUES :][..., :VALUES] * x[..., 2 * VALUES + a, None] for a in range(2)], 2
        )


class Toys:
    """A stream of this model."""

    def __init__(self):
        bridge = Bridge()
        self.config = SimpleNamespace(rows_per_forward=32)
        self.text = SimpleNamespace(name="toys")
        self.model = SimpleNamespace(
            name="toy model", hook="place", widths={"place": D}, device=torch.device("cpu"), bridge=bridge,
            logits=lambda tokens: bridge.head(states(tokens)).detach(), place=lambda hook: f"the {hook}",
            rows_with_logits=lambda T: 64,
        )  # fmt: skip
        self.positions = PLACES

    def read(self, rows: TokenRows) -> Any:
        return {"place": states(rows.tokens)}, torch.ones_like(rows.tokens, dtype=torch.bool)


def toy_prompts() -> Prompts:
    rows = [
        ([entity, 0, a], PLACES - 1, a * VALUES + int(value(torch.tensor(entity), a)), NAMES[a])
        for entity in range(ENTITIES)
        for a in range(2)
    ]
    return Prompts.of(rows, 0, NAMES)


def sae(directions: torch.Tensor) -> SparseAutoencoder:
    """Latents along orthonormal directions; one fires where x has more than nothing of its own."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=len(directions), activation="relu", k=4))
    with torch.no_grad():
        sae.W_enc.copy_(directions.T)
        sae.W_dec.copy_(directions)
    return sae


def entangled() -> torch.Tensor:
    """Orthonormal directions that have as much of the colour as of the shape, and those of what is asked for."""
    mixed = torch.cat([torch.eye(VALUES)] * 2, 1) / 2**0.5
    other = torch.cat([torch.eye(VALUES), -torch.eye(VALUES)], 1) / 2**0.5
    directions = torch.zeros(4 * VALUES + 2, D)
    directions[: 3 * VALUES, : 2 * VALUES] = torch.cat([mixed, other, -other])
    directions[-2:, -2:] = torch.eye(2)
    return directions


@pytest.fixture
def toys(monkeypatch) -> Any:
    monkeypatch.setattr(module, "_known", lambda evaluation: (toy_prompts(), 2 * ENTITIES))
    monkeypatch.setattr(module, "EPOCHS", 20)
    return lambda directions, random=None: Evaluation(
        cast(Any, Toys()), sae(directions), None if random is None else sae(random), neurons=False
    )


def test_latents_of_single_attributes_change_one_and_leave_the_other(toys):
    found = json.loads(json.dumps(ravel(toys(torch.eye(D), entangled())), allow_nan=False))
    assert (found["score"], found["cause"], found["isolation"]) == (1, 1, 1)
    assert found["whole"] == {"score": 0.5, "cause": 1, "isolation": 0}
    random, shuffled = found["controls"]["random"], found["controls"]["shuffled"]
    assert random["score"] < 0.8
    assert shuffled["score"] < 0.9
    assert set(found["attributes"]) == {"toys: colour", "toys: shape"}
    assert all(scores["latents"] == VALUES for scores in found["attributes"].values())
    assert found["latents"] == shuffled["latents"] == VALUES
    for key in ("score", "cause", "isolation"):
        edges = found["intervals"][key]
        assert edges["above_random"]["difference"] == pytest.approx(found[key] - random[key])
        assert edges["low"] <= found[key] <= edges["high"]
    assert found["intervals"]["score"]["items"] == found["pairs"] > 60
    assert (found["known"], found["prompts"]) == (2 * ENTITIES, 2 * ENTITIES)


def test_a_mask_that_is_not_trained_changes_nothing(toys, monkeypatch):
    monkeypatch.setattr(module, "RATE", 0.0)
    found = ravel(toys(torch.eye(D)))
    assert (found["score"], found["cause"], found["isolation"], found["latents"]) == (0.5, 0, 1, 0)
    assert found["intervals"]["score"]["above_random"] is None


def test_without_the_error_a_bad_reconstruction_loses_isolation(toys, monkeypatch):
    monkeypatch.setattr(module, "RATE", 0.0)
    colours = torch.eye(D)[:VALUES]  # no latent for the shape, nor for what is asked for
    assert ravel(toys(colours))["isolation"] == 1
    assert ravel(toys(colours), keep_error=False)["isolation"] < 0.5


def test_answers_are_those_at_the_hook_and_weights_keep_their_gradients(toys):
    evaluation = toys(torch.eye(D))
    bridge = cast(Any, evaluation.stream.model.bridge)
    with _frozen(evaluation.stream.model):
        assert not bridge.scale.requires_grad
    ravel(evaluation)
    assert set(bridge.hooks) == {"the place"}
    assert bridge.scale.requires_grad
    assert bridge.scale.grad is None


def test_pairs_are_of_cause_and_of_isolation(toys):
    prompts, evaluation = toy_prompts(), toys(torch.eye(D))
    training, testing, used = _pairs(prompts, evaluation)
    assert used == [0, 1]
    assert (len(training), len(testing)) == (4 * module.TRAIN, 4 * module.TEST)
    for pairs in (training, testing):
        base, source = (prompts.only(numbers) for numbers in (pairs.base, pairs.source))
        assert (base.answer != source.answer).all()
        assert (base.attribute == source.attribute).all()
        assert torch.equal(base.attribute == pairs.mask, pairs.cause)
        assert pairs.cause.float().mean() == 0.5
    numbers = [
        {(int(b), int(s), int(m)) for b, s, m in zip(pairs.base, pairs.source, pairs.mask, strict=True)}
        for pairs in (training, testing)
    ]
    assert len(numbers[0]) == len(training)
    assert not numbers[0] & numbers[1]
    few = prompts.only(torch.arange(6))
    with pytest.raises(UserError, match="^ravel: the model completes 6 prompts right, too few for any attribute$"):
        _pairs(few, evaluation)


def test_facts_of_the_embedded_language(stream_of, monkeypatch):
    """All of them are known, and all of x at a prompt's last token decides the answer."""
    monkeypatch.setattr(module, "language_prompts", lambda language, start: few(language_prompts(language, start)))
    few = lambda prompts: prompts.only(prompts.attribute < 3)
    both = [SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4), seed=seed) for seed in (0, 1)]
    evaluation = Evaluation(stream_of(), *both, share=6)
    found = ravel(evaluation)
    assert found["known"] == found["prompts"] == 120
    assert found["whole"] == {"score": 0.5, "cause": 1, "isolation": 0}
    assert list(found["attributes"]) == ["countries: crop", "countries: metal", "countries: colour"]
    assert set(found["controls"]) == {"random", "lm_neurons", "shuffled"}
    assert found["pairs"] == 3 * 2 * 8
    assert json.dumps(ravel(evaluation)) == json.dumps(found)


def test_prompts_of_the_language_end_before_the_object():
    language = Language()
    prompts = language_prompts(language, LABELLED)
    assert len(prompts) == 2 * len(facts())
    assert (prompts.place == prompts.length - 1).all()
    for i in (0, 1, 250, 479):
        fact = facts()[i // 2]
        words = [language.vocabulary[token] for token in prompts.tokens[i, : prompts.length[i]]]
        assert {fact.entity, fact.relation} < set(words[-6:])
        assert words[-1] == "is"
        assert language.vocabulary[prompts.answer[i]] == fact.object
        assert prompts.names[prompts.attribute[i]] == (fact.domain, fact.relation)


def contents(**changes: Any) -> dict[str, Any]:
    by_entity: dict[str, dict[str, str]] = {}
    for fact in facts():
        if fact.domain == "countries":
            by_entity.setdefault(fact.entity, {})[fact.relation] = fact.object
    templates = {relation: [f"the {relation} of %s is", f"for %s the {relation} is"] for relation in ("crop", "metal")}
    return {"entities": by_entity, "templates": templates} | changes


def test_prompts_of_a_file(stream_of, tmp_path):
    path = tmp_path / "countries.json"
    path.write_text(json.dumps(contents()))
    stream = stream_of()
    prompts = file_prompts([str(path)], stream)
    tokenizer = stream.model.tokenizer
    assert prompts.names == (("countries", "crop"), ("countries", "metal"))
    assert len(prompts) == 20 * 2 * 2
    by_entity = contents()["entities"]
    for i in range(len(prompts)):
        words = tokenizer.decode(prompts.tokens[i, : prompts.length[i]]).split()
        entity = words[int(prompts.place[i])]
        relation = prompts.names[prompts.attribute[i]][1]
        assert (words[0], words[-1]) == ("<bos>", "is")
        assert tokenizer.decode([int(prompts.answer[i])]) == by_entity[entity][relation]
    again = file_prompts([str(path)], stream)
    assert torch.equal(prompts.tokens, again.tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'is not allowed; it must be an object with "entities" and "templates"'),
        (contents(templates={"crop": ["the crop of %s is"]}), "templates: at least two attributes are needed"),
        (
            contents(templates={"crop": ["of %s"], "metal": ["of"]}),
            "templates: 'metal' is not allowed; it must be a list of",
        ),
        (
            contents(entities={"x": {"crop": 3}}),
            "entities: 'x' is not allowed; it must be an object of attributes and their",
        ),
        (contents(entities={"x": {"size": "big"}}), "entities: 'x' has no attribute with a template"),
    ],
)
def test_a_file_that_is_not_allowed_is_named(stream_of, tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(UserError) as error:
        file_prompts([str(path)], stream_of())
    assert str(error.value).startswith(f"ravel: {path}")
    assert message in str(error.value)


def test_what_it_needs_is_said(stream_of, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text\n\n" * 100)
    cfg = SAEConfig(d_in=128, d_sae=32, k=2)
    stream = stream_of(data=str(text))
    assert suite.missing_inputs("ravel", stream, cfg, [], {}) == {"": f"{stream.text.name} {NO_FACTS}"}
    gone = suite.missing_inputs("ravel", stream, cfg, [], {"ravel": ("gone.json",)})
    assert gone == {"": "--file gone.json does not exist"}
    assert suite.missing_inputs("ravel", stream_of(), cfg, [], {}) == {}
    transcoder = cfg.model_copy(update={"d_out": 128})
    assert "a transcoder is not allowed" in suite.missing_inputs("ravel", stream_of(), transcoder, [], {})[""]
    with pytest.raises(UserError, match="has no facts about entities"):
        ravel(Evaluation(stream, SparseAutoencoder(cfg), None))


def test_batches_do_not_change_the_scores(toys, monkeypatch):
    found = []
    for size in (7, 96):
        monkeypatch.setattr(module, "BATCH", size)
        monkeypatch.setattr(module, "RATE", 0.0)
        found.append(ravel(toys(torch.eye(D), entangled())) | {"protocol": None})
    np.testing.assert_equal(*found)
