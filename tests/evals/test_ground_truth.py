"""Recovery of known variables, on dictionaries of which every score is known beforehand."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream
from temposae.evals.evaluation import Evaluation
from temposae.evals.ground_truth import best_latents, ground_truth, variables
from temposae.evals.variable_effects import greedy, recovered
from temposae.kernels.code import SparseCode

D, ROWS = 128, 96


class Told:
    """An autoencoder whose latents are given beforehand: acts [n, F] of exactly the tokens that it is shown, in order."""

    def __init__(self, acts: np.ndarray, W_dec: np.ndarray | None = None):
        self.acts, self.at = torch.from_numpy(acts).float(), 0
        self.W_dec = torch.zeros(acts.shape[1], D) if W_dec is None else torch.from_numpy(W_dec)

    def encode_sparse(self, x, pos):
        part = self.acts[self.at : self.at + len(x)]
        self.at += len(x)
        indices = torch.arange(part.shape[1], dtype=torch.int32).expand(part.shape).contiguous()
        return SparseCode(part, indices, part.shape[1])

    def decode(self, f):
        raise AssertionError("no reconstruction is needed here")


@pytest.fixture(scope="module")
def evaluation(testbed):
    stream = ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=16), model=testbed)
    return Evaluation(stream, SparseAutoencoder(SAEConfig(d_in=D, d_sae=8, k=4)), None)


def told(evaluation: Evaluation, acts: np.ndarray, monkeypatch, W_dec: np.ndarray | None = None) -> dict:
    autoencoder = Told(acts, W_dec)
    monkeypatch.setattr(evaluation, "autoencoders", lambda collected, **options: {"sae": autoencoder})
    return ground_truth(evaluation, rows=ROWS)


def half(evaluation: Evaluation) -> np.ndarray:
    """Which of the documents a latent is chosen on."""
    return evaluation.generator("ground truth halves").permutation(ROWS) % 2 == 0


def truths(evaluation: Evaluation) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    collected = evaluation.labelled(ROWS)
    return variables(collected, half(evaluation)[collected.row.numpy()])


def test_variables_are_what_the_text_says(evaluation):
    """Against the words themselves."""
    collected = evaluation.labelled(ROWS)
    words = np.array(evaluation.stream.text.language.vocabulary)[collected.tokens[collected.kept].numpy()]
    found = truths(evaluation)
    assert set(words[found["role=topic_name"][1]]) <= set(evaluation.stream.text.language.topics)
    assert set(words[found["role=ordinal"][1]]) == {"first", "second", "third", "fourth"}
    assert set(words[found["role=connective"][1]]) == {"so", "alas"}
    applies, plural = found["plural noun"]
    assert {str(word).endswith("s") for word in words[plural]} == {True}
    assert not {"is", "was", "are", "were"} & set(words[applies])
    applies, forget = found["fact to forget"]
    domains = {"source", "target", "antidote"}, {"crop", "metal", "pet", "hobby", "theme"}
    assert domains[0] <= set(words[forget])
    assert not domains[1] & set(words[forget])
    assert domains[1] <= set(words[applies])
    casual, formal = (found[f"tone={tone}"] for tone in ("casual", "formal"))
    assert (casual[1] == ~formal[1]).all()
    assert "role=none" not in found
    assert all(min(true.sum(), (applies & ~true).sum()) >= 50 for applies, true in found.values())


def test_latents_that_are_the_labels_recover_everything(evaluation, monkeypatch):
    truth = truths(evaluation)
    acts = np.stack([true for _, true in truth.values()], 1) * 3.0
    x = evaluation.labelled(ROWS).x.double().numpy()
    effects = np.stack([x[true].mean(0) - x[applies & ~true].mean(0) for applies, true in truth.values()])
    found = told(evaluation, acts, monkeypatch, effects / 3)
    assert found["detected"] == found["mean_f1"] == 1
    assert found["recovered_by"]["1"] > 0.9
    assert found["recovered"] > 0.95
    for name, variable in found["variables"].items():
        column = acts[:, variable["latent"]] > 0
        applies, true = truth[name]
        assert (column[applies] == true[applies]).all()
    assert [level["share"] for level in found["detected_at"]] == [1] * 10
    shuffled = found["controls"]["shuffled"]
    assert shuffled["recovered_by"]["1"] < 0.2
    assert shuffled["recovered"] < 0.5
    assert shuffled["detected"] < 0.1  # section=body is most of the tokens: F1 of all of them is above 0.8
    assert shuffled["mean_f1"] < 0.5
    assert shuffled["mean_top_5"] < 0.7


def test_scores_are_those_of_the_formula(evaluation, monkeypatch):
    """One latent fires on the true tokens at even places and on all false tokens at places that are multiples of 10."""
    truth = truths(evaluation)
    _, true = truth["role=relation"]
    even, tenth = np.arange(len(true)) % 2 == 0, np.arange(len(true)) % 10 == 0
    fires = (true & even) | (~true & tenth)
    found = told(evaluation, np.stack([fires, np.zeros_like(fires)], 1) * 1.0, monkeypatch)["variables"][
        "role=relation"
    ]
    scored = ~half(evaluation)[evaluation.labelled(ROWS).row.numpy()]
    hit = (fires & true & scored).sum()
    assert found["precision"] == pytest.approx(hit / (fires & scored).sum())
    assert found["recall"] == pytest.approx(hit / (true & scored).sum())
    assert found["f1"] == pytest.approx(2 / (1 / found["precision"] + 1 / found["recall"]))
    assert found["latent"] == 0


def test_the_latent_is_chosen_on_one_half_and_scored_on_the_other():
    """Latent 0 is right where the choice is made and never where it is scored; latent 1 the other way round."""
    true, choosing = np.arange(40) % 2 == 0, np.arange(40) < 20
    fired = csr_array(np.stack([true & choosing, true & ~choosing], 1).astype(float))
    (found,) = best_latents(fired, np.ones((1, 40), bool), true[None], true[None], choosing)
    assert found == {"latent": 0, "f1": 0.0, "precision": None, "recall": 0.0}
    (found,) = best_latents(fired, np.ones((1, 40), bool), true[None], true[None], ~choosing)
    assert (found["latent"], found["f1"]) == (1, 0.0)


def test_tokens_to_which_a_variable_does_not_apply_count_nowhere():
    applies, true = np.arange(40) % 4 < 2, np.arange(40) % 4 == 0
    fired = csr_array((true | ~applies).astype(float)[:, None])
    (found,) = best_latents(fired, applies[None], true[None], true[None], np.arange(40) < 20)
    assert found == {"latent": 0, "f1": 1.0, "precision": 1.0, "recall": 1.0}


def test_only_activations_above_zero_fire(evaluation, monkeypatch):
    """Neurons are also negative: latent 0 is negative on the wrong tokens, positive on the right ones."""
    _, true = truths(evaluation)["role=ordinal"]
    found = told(evaluation, np.where(true, 2.0, -2.0)[:, None], monkeypatch)["variables"]["role=ordinal"]
    assert (found["f1"], found["top_5"]) == (1, 1)


def test_the_share_recovered_is_that_of_the_reconstruction(evaluation, monkeypatch):
    """Two latents and every variable, against x_hat itself: the best latent's alone, then both."""
    truth, x = truths(evaluation), evaluation.labelled(ROWS).x.double().numpy()
    acts = np.random.default_rng(0).random((len(x), 2)) * (x[:, :2] > 0)
    W_dec = np.random.default_rng(1).normal(size=(2, D)) + x.mean(0)
    found = told(evaluation, acts, monkeypatch, W_dec)["variables"]
    acts = acts.astype(np.float32).astype(np.float64)
    chosen_on = half(evaluation)[evaluation.labelled(ROWS).row.numpy()]

    def share(x_hat: np.ndarray, applies: np.ndarray, true: np.ndarray, where: np.ndarray) -> float:
        effect, written = (
            values[true & where].mean(0) - values[applies & ~true & where].mean(0) for values in (x, x_hat)
        )
        return 1 - ((effect - written) ** 2).sum() / (effect**2).sum()

    for name, of_variable in found.items():
        first = [share(acts[:, [j]] @ W_dec[[j]], *truth[name], chosen_on) for j in (0, 1)]
        best = [int(np.argmax(first))]
        assert of_variable["recovered_by"]["1"] == pytest.approx(
            share(acts[:, best] @ W_dec[best], *truth[name], ~chosen_on), abs=1e-9
        )
        assert of_variable["recovered"] == of_variable["recovered_by"]["20"]  # both latents
        assert of_variable["recovered"] == pytest.approx(share(acts @ W_dec, *truth[name], ~chosen_on), abs=1e-9)


def test_a_detecting_latent_that_writes_elsewhere_recovers_nothing(evaluation, monkeypatch):
    """One latent per variable fires on exactly its tokens, but its row of the decoder is random."""
    truth = truths(evaluation)
    acts = np.stack([true for _, true in truth.values()], 1) * 1.0
    draw = np.random.default_rng(0).normal(size=(acts.shape[1], D))
    found = told(evaluation, acts, monkeypatch, draw / np.linalg.norm(draw, axis=1, keepdims=True))
    assert found["detected"] == 1
    assert found["recovered_by"]["1"] < 0.1
    assert found["recovered"] < 0.3


def test_latents_are_taken_greedily_by_what_they_leave():
    """Row 2 is along the effect but its latent does not change with the variable; row 1 would leave most."""
    effect, W_dec = np.array([2.0, 1.0, 0.0]), np.array([[1.0, 0, 0], [0, 1.0, 0], [2.0, 1.0, 0], [0, 0, 1.0]])
    assert greedy(effect, np.array([2.0, 0.5, 0.0, 0.1]), W_dec, 4) == [0, 1, 2, 3]
    assert greedy(effect, np.array([8.0, 0.5, 0.0, 0.1]), W_dec, 2) == [
        1,
        2,
    ]  # eight times as much is worse than nothing
    assert greedy(effect, np.array([2.0, 0.5, 1.0, 0.1]), W_dec, 1) == [2]


def test_effects_are_chosen_on_one_half_and_scored_on_the_other():
    """Latent 0 follows the variable only where the choice is made, latent 1 only where it is scored."""
    true, choosing, applies = np.arange(40) % 2 == 0, np.arange(40) < 20, np.ones(40, bool)
    x, acts = true[:, None] * np.array([[1.0, 2.0]]), csr_array(np.stack([true & choosing, true & ~choosing], 1) * 1.0)
    W_dec = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert recovered(x, acts, W_dec, [(applies, true, true)], choosing, (1, 5)) == {1: [0], 5: [1]}
    assert recovered(x, acts, W_dec, [(applies, true, true)], np.ones(40, bool) ^ choosing, (1,)) == {1: [0]}
    followed = csr_array(true[:, None] * 1.0)
    assert recovered(x, followed, W_dec[:1], [(applies, true, true)], choosing, (1,)) == {1: [1]}


def test_a_transcoder_has_no_share_recovered(testbed, stream_of):
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_out=D, d_sae=32, k=4))
    found = ground_truth(Evaluation(stream_of(), sae, None), rows=24)
    assert found["recovered"] is found["intervals"]["recovered"] is None
    assert found["intervals"]["mean_f1"] is not None
    assert {variable["recovered"] for variable in found["variables"].values()} == {None}


def test_a_dictionary_that_never_fires_recovers_nothing(evaluation, monkeypatch):
    found = told(evaluation, np.zeros((len(evaluation.labelled(ROWS).x), 6)), monkeypatch)
    assert (found["recovered"], found["detected"], found["mean_f1"], found["mean_top_5"]) == (0, 0, 0, 0.5)


def test_a_rerun_gives_the_same_whatever_came_before(stream_of):
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=32, k=4))
    first = Evaluation(stream_of(), sae, None)
    again = Evaluation(stream_of(rows_per_forward=5), sae, None)
    again.generator("something else").random(10)
    again.labelled(8)
    found = [ground_truth(e, rows=24) for e in (first, again)]
    assert found[0] == found[1]
    assert set(found[0]["controls"]) == {"lm_neurons", "shuffled"}
    assert 0 < found[0]["mean_f1"] < 1


def test_too_few_documents_are_refused(evaluation):
    with pytest.raises(UserError, match="rows: 1 is not allowed; .* give at least 100"):
        ground_truth(evaluation, rows=1)


def test_other_text_is_refused(stream_of, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(["the boat is old ."] * 40))
    evaluation = Evaluation(stream_of(data=str(file)), SparseAutoencoder(SAEConfig(d_in=D, d_sae=8, k=4)), None)
    with pytest.raises(UserError, match="text.txt has no labels; this eval needs the embedded language"):
        ground_truth(evaluation)
