"""Position information on latents of which it is known, and fidelity on dictionaries whose score is."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import mutual_info_score
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.evals import fidelity as fid
from temposae.evals.evaluation import Evaluation, Reference, TextActivations
from temposae.evals.fidelity import fidelity
from temposae.evals.positions import BinnedTokens, firings_per_bin, information, positions
from temposae.evals.slicing import slicings
from temposae.kernels.code import SparseCode

D, ROWS, T = 128, 150, 64


def sparse(dense: np.ndarray) -> SparseCode:
    token, latent = np.nonzero(dense)
    offsets = torch.from_numpy(np.searchsorted(token, np.arange(len(dense) + 1)))
    values = torch.from_numpy(dense[token, latent].astype(np.float32))
    return SparseCode(values, torch.from_numpy(latent.astype(np.int32)), dense.shape[1], offsets)


@pytest.fixture
def evaluation(stream_of) -> Evaluation:
    return Evaluation(stream_of(), SparseAutoencoder(SAEConfig(d_in=D, d_sae=96, k=6)), None)


def plain(rows: int = ROWS, width: int = T) -> TextActivations:
    """Rows of text of which every token counts."""
    kept = torch.ones(rows, width, dtype=torch.bool)
    row, pos = kept.nonzero(as_tuple=True)
    return TextActivations(torch.full((rows, width), 9), kept, torch.zeros(len(row), 1), pos, row)


def measured(evaluation: Evaluation, collected: TextActivations, dense: np.ndarray, bins: int = 4):
    draw = np.random.default_rng(0)
    drawn = BinnedTokens.of(evaluation, collected, bins, 0, draw)
    return information(sparse(dense), drawn, [drawn.shuffled(draw) for _ in range(20)]), drawn


def coin(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_a_latent_that_is_position_tells_all_of_it(evaluation):
    texts = plain()
    pos = texts.pos.numpy()
    dense = np.stack([pos < 16, (pos >= 16) & (pos < 48), pos * 0 + 1, pos * 0], 1) * 1.0
    found, _ = measured(evaluation, texts, dense)
    # chance is about (bins - 1) / 2 nats for all tokens together
    chance = 3 / 2 / len(pos)
    np.testing.assert_allclose(found["mutual_information"], [coin(0.25), coin(0.5), 0, 0], atol=2 * chance)
    np.testing.assert_allclose(found["specialization"], [1, 1, 0, 0], atol=4 * chance)
    np.testing.assert_allclose(found["nats_per_firing"], [math.log(4), math.log(2), 0, 0], atol=8 * chance)
    np.testing.assert_allclose(found["variance_explained"], [1, 1, 0, 0], atol=1e-9)


def test_what_chance_gives_is_taken_off(evaluation):
    """Of latents that fire rarely and anywhere, most of the plain I / H is chance; of one tied to its rows, all is 0."""
    texts, draw = plain(), np.random.default_rng(1)
    dense = (draw.random((len(texts.pos), 300)) < 20 / len(texts.pos)) * 1.0
    found, drawn = measured(evaluation, texts, dense, bins=16)
    active = dense[drawn.at] > 0
    plainly = [mutual_info_score(drawn.bin, one) / coin(one.mean()) for one in active.T if one.any()]
    assert np.mean(plainly) > 0.05
    assert found["specialization"].mean() < np.mean(plainly) / 4
    assert found["specialization"].min() == 0  # where chance gives more than there is
    row_label = (texts.row.numpy() % 3 == 0)[:, None] * 1.0
    assert measured(evaluation, texts, row_label)[0]["mutual_information"] == pytest.approx(0, abs=1e-12)


def test_shuffles_stay_within_rows(evaluation):
    _, drawn = measured(evaluation, texts := plain(), np.ones((ROWS * T, 1)), bins=5)
    shuffled = drawn.shuffled(np.random.default_rng(2))
    for row in range(0, len(texts), 10):
        here = drawn.row == row
        assert sorted(shuffled[here]) == sorted(drawn.bin[here])
        assert shuffled[here].tolist() != drawn.bin[here].tolist()


def test_figures_are_those_of_the_formulas(evaluation):
    """Against scikit-learn and scipy on the dense code, of values of both signs and with ties."""
    texts, draw = plain(40), np.random.default_rng(3)
    pos = texts.pos.numpy()
    scale = draw.normal(size=12) + draw.normal(size=12) * pos[:, None] / 30
    dense = np.round(scale + draw.normal(size=scale.shape), 1) * (draw.random(scale.shape) < 0.3 + pos[:, None] / 120)
    dense[:, 0] = 1.0
    dense[:, 1] = np.arange(len(dense))[::-1] + 1.0  # never zero
    found, drawn = measured(evaluation, texts, dense, bins=6)
    own = dense[drawn.at].astype(np.float32).astype(np.float64)
    shuffles = np.random.default_rng(0)
    again = BinnedTokens.of(evaluation, texts, 6, 0, shuffles)
    others = [again.shuffled(shuffles) for _ in range(20)]
    for j, a in enumerate(own.T):
        chance = np.mean([mutual_info_score(bin_, a != 0) for bin_ in others])
        expected = max(0, mutual_info_score(drawn.bin, a != 0) - chance)
        assert found["mutual_information"][j] == pytest.approx(expected, abs=1e-9)
        within = np.mean([a[drawn.bin == b].var() for b in range(6)])
        assert found["variance_explained"][j] == pytest.approx(1 - within / a.var() if j else 0, abs=1e-6)
        rho = spearmanr(a, pos[drawn.at])[0] if j else 0
        assert found["spearman"][j] == pytest.approx(rho, abs=1e-9)
        assert found["firings"][j] == (a != 0).sum()


def test_firings_of_dense_codes_are_counted_alike():
    rng = np.random.default_rng(0)
    M, F, B = 9000, 13, 4  # more than two chunks of tokens
    token, latent = (rng.random((M, F)) < 0.3).nonzero()
    shuffled = rng.permutation(len(token))
    bins = [rng.integers(B, size=M) for _ in range(3)]
    one, other = (
        firings_per_bin(latent[shuffled], token[shuffled], F, bins, B, dense=dense) for dense in (False, True)
    )
    assert sum(counts.sum() for counts in one) == 3 * len(token)
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("first", [0, 8])
def test_bins_hold_equally_many_tokens_and_nothing_special(evaluation, first):
    texts = evaluation.labelled(24)
    texts = TextActivations(
        texts.tokens, torch.ones_like(texts.kept), texts.x, *[None] * 2
    )  # as if nothing had been left out
    texts.row, texts.pos = texts.kept.nonzero(as_tuple=True)
    drawn = BinnedTokens.of(evaluation, texts, 7, first, np.random.default_rng(0))
    assert len(set(np.bincount(drawn.bin))) == 1
    assert (np.diff(drawn.at) > 0).all()
    tokens = texts.tokens[texts.kept][drawn.at]
    assert not torch.isin(tokens, torch.tensor(evaluation.stream.model.tokenizer.all_special_ids)).any()
    assert drawn.pos.min() == max(first, 1)
    assert len(drawn.at) > 0.85 * ((texts.pos >= first) & (texts.tokens[texts.kept] > 3)).sum()
    highest = [drawn.pos[drawn.bin == b].max() for b in range(7)]
    assert all(drawn.pos[drawn.bin == b + 1].min() == highest[b] + 1 for b in range(6))


def sliced(ranges: int = 4) -> SparseAutoencoder:
    """Every latent always fires within its range of positions."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=96, activation="relu"))
    with torch.no_grad():
        sae.b_enc.fill_(1e3)
    return slicings(sae, 128, ranges=ranges)["ranges"]


def test_positions_of_a_stream(stream_of):
    sae, random = (SparseAutoencoder(SAEConfig(d_in=D, d_sae=96, k=6), seed=seed) for seed in (1, 2))
    found = [positions(Evaluation(stream_of(rows_per_forward=n), sae, random), rows=24, shuffles=3) for n in (5, 24)]
    one, two = (json.dumps(result, allow_nan=False) for result in found)
    assert one == two
    assert set(found[0]["controls"]) == {"random", "lm_neurons"}
    assert found[0]["agreement"] is found[0]["reference"] is None
    assert found[0]["after_first_8"] != {key: found[0][key] for key in found[0]["after_first_8"]}
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    dead = positions(Evaluation(stream_of(), sae, None), Reference(sae), rows=4, bins=4, shuffles=1)
    assert (dead["alive"], dead["specialization"]) == (0, None)
    assert dead["agreement"]["value"] is dead["agreement"]["shuffled"]["value"] is None
    with pytest.raises(UserError, match="bins: 500 is not allowed; give 2 to "):
        positions(Evaluation(stream_of(), sae, None), rows=4, bins=500)
    with pytest.raises(UserError, match="shuffles: 0 is not allowed"):
        positions(Evaluation(stream_of(), sae, None), rows=4, shuffles=0)


def identity(mask: MaskConfig | None = None) -> SparseAutoencoder:
    """Latents x_i and -x_i: it reconstructs everything."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=2 * D, activation="relu", mask=mask or MaskConfig()))
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
    return sae


def test_identity_is_faithful_everywhere_and_nothing_is_not(stream_of):
    found = fidelity(Evaluation(stream_of(), identity(), None), rows=24, bins=5, ce_rows=8, shift_rows=4)
    json.dumps(found, allow_nan=False)
    assert min(found["snr"]["by_bin"]) > 60  # an explained variance of 1 up to 1e-6
    assert max(found["snr"]["by_bin"]) <= 120
    assert found["ce_recovered"]["by_bin"] == pytest.approx([1] * 5, abs=1e-3)
    nothing = identity()
    with torch.no_grad():
        nothing.W_dec.zero_()
    found = fidelity(Evaluation(stream_of(), nothing, None), rows=24, bins=5, ce_rows=8, shift_rows=4)
    assert found["ce_recovered"]["by_bin"] == pytest.approx([0] * 5, abs=1e-9)
    assert found["snr"]["worst"] == min(found["snr"]["by_bin"]) < 0


def test_a_bin_where_the_dictionary_is_off_shows(stream_of):
    """Masked in the last half of the row: nothing is lost before, and what is after is as without a dictionary."""
    sae = identity(MaskConfig(kind="ranges", positions=128, ranges=2))
    sae.mask.fixed = torch.arange(128)[:, None].expand(128, 2 * D) < 64
    evaluation = Evaluation(stream_of(), sae, None)
    found = fidelity(evaluation, rows=24, bins=8, ce_rows=24, shift_rows=4)
    texts = evaluation.labelled(24)
    x, pos = texts.x.double(), texts.pos
    for (low, high), got in zip(found["bins"], found["snr"]["by_bin"], strict=True):
        here = (pos >= low) & (pos <= high)
        lost = x[here & (pos >= 64)].square().sum()
        explained = float(1 - lost / (x[here] - x.mean(0)).square().sum())
        assert 1 - 10 ** (-got / 10) == pytest.approx(explained, abs=1e-5)
    early, late = found["ce_recovered"]["by_bin"][:3], found["ce_recovered"]["by_bin"][-3:]
    assert min(early) > 0.99
    assert max(late) < 0.5
    assert found["ce_recovered"]["worst"] == min(found["ce_recovered"]["by_bin"])


def test_content_that_moves():
    """On token embeddings nothing but a mask can tell that text has moved."""
    stream = ActivationStream(StreamConfig(rows_per_forward=8), model=LanguageModel("testbed", hook="hook_embed"))
    plainly = SparseAutoencoder(SAEConfig(d_in=D, d_sae=96, k=6))
    found = fidelity(Evaluation(stream, plainly, None), rows=8, ce_rows=2, shift_rows=6)
    for of in (found, found["controls"]["lm_neurons"]):
        assert of["shifts"] == {str(shift): {"stay": 1, "jaccard": 1} for shift in (0, 16, 64)}
    found = fidelity(Evaluation(stream, sliced(), None), rows=8, ce_rows=2, shift_rows=6)
    own = np.arange(17, 64)
    for shift in (0, 16, 64):
        share = (own // 32 == (own + shift) // 32).mean()  # a latent stays where its range does
        assert found["shifts"][str(shift)] == {"stay": pytest.approx(share), "jaccard": pytest.approx(share)}


def test_what_fidelity_refuses(stream_of):
    transcoder = SparseAutoencoder(SAEConfig(d_in=D, d_out=D, d_sae=8, k=2))
    with pytest.raises(UserError, match="sae.d_out: 128 is not allowed"):
        fidelity(Evaluation(stream_of(), transcoder, None))
    with pytest.raises(UserError, match="stream.context: 64 is not allowed; shifts need two rows of 82 tokens"):
        fidelity(Evaluation(stream_of(context=64), identity(), None), rows=4)


def test_overlap_of_the_latents_of_a_token():
    old = sparse(np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    new = sparse(np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]))
    found = fid._overlap(old, new)
    assert found == {"stay": pytest.approx((1 / 2 + 0) / 2), "jaccard": pytest.approx((1 / 3 + 0 + 0) / 3)}
