"""Description lengths: codes whose bits are known, against float64, and what makes a code longer."""

import json
import math

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals import evaluation as shared
from temposae.evals import mdl as module
from temposae.evals.evaluation import Evaluation, TextActivations, joined
from temposae.evals.intervals import Outcomes
from temposae.evals.mdl import coarsest_width, code_length, mdl, rounded
from temposae.evals.suite import missing_inputs
from temposae.kernels.code import SparseCode


class Directions:
    """Latents with orthogonal directions, so that rounding errors are those of the activations."""

    def __init__(self, d: int):
        self.W_dec = torch.eye(d)

    def decode(self, f: SparseCode) -> torch.Tensor:
        return f.to_dense()


def sparse(f: torch.Tensor) -> SparseCode:
    """Ragged code of dense f [n, F]."""
    width = f.shape[1]
    return joined([SparseCode(f, torch.arange(width, dtype=torch.int32).expand(f.shape).contiguous(), width)])


def binary(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


def reference(f: np.ndarray, width: float) -> tuple[float, float, float]:
    """Active, value and uniform bits by counting the values of each column, in float64."""
    which = value = uniform = 0.0
    for column in f.T:
        used = column[column != 0]
        p = len(used) / len(column)
        which += binary(p)
        if len(used):
            bins = np.floor(used / width)
            shares = np.unique(bins, return_counts=True)[1] / len(used)
            value -= p * float((shares * np.log2(shares)).sum())
            uniform += p * math.log2(bins.max() - bins.min() + 1)
    return which, value, which + uniform


def made(n: int = 3000, F: int = 12) -> torch.Tensor:
    """Signed activations; latent 0 never fires, latent 1 always, the others ever more often."""
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(n, F, generator=draw) * torch.linspace(0.5, 4, F)
    rate = torch.linspace(0, 0.6, F)
    rate[1] = 1
    return f * (torch.rand(n, F, generator=draw) < rate)


def test_bernoulli_latents_have_the_binary_entropy():
    """Exact shares: 1/4 and 1/2 of the tokens, always, never; one value each, so nothing is left for values."""
    f = torch.zeros(64, 4)
    f[::4, 0], f[::2, 1], f[:, 2] = 1.0, 3.0, 2.0
    length = code_length(sparse(f), 0.5)
    assert length.active.tolist() == pytest.approx([binary(0.25), 1, 0, 0], abs=1e-12)
    assert length.value.tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert length.bits == length.uniform == pytest.approx(binary(0.25) + 1)
    assert length.bins.tolist() == [1, 1, 1, 0]


def test_equally_frequent_bins_cost_their_logarithm():
    """Active at half of the tokens in one of 8 bins: 1 + 3 / 2 bits. With a bin far away, only uniform bits grow."""
    f = torch.zeros(160, 1)
    f[::2, 0] = torch.arange(80).remainder(8) + 0.5
    length = code_length(sparse(f), 1.0)
    assert (length.bits, length.uniform) == (pytest.approx(2.5), pytest.approx(2.5))
    f[f == 7.5] = 31.5
    length = code_length(sparse(f), 1.0)
    assert (length.bits, length.uniform) == (pytest.approx(2.5), pytest.approx(1 + 5 / 2))


@pytest.mark.parametrize("width", [0.25, 1.0, 30.0])
def test_bits_are_those_counted_in_float64(width):
    f = made()
    length = code_length(sparse(f), width)
    which, value, uniform = reference(f.numpy().astype(np.float64), width)
    assert float(length.active.sum()) == pytest.approx(which, rel=1e-12)
    assert float(length.value.sum()) == pytest.approx(value, rel=1e-12)
    assert length.uniform == pytest.approx(uniform, rel=1e-12)
    assert length.bits <= length.uniform
    # the tokens' own codes: -log2 of the frequency of the value, summed over latents
    assert float(length.by_token.mean()) == pytest.approx(which + value, rel=1e-12)
    symbols = torch.where(f == 0, math.inf, (f / width).floor())
    shares = torch.stack([(column[:, None] == column).double().mean(1) for column in symbols.T], 1)
    torch.testing.assert_close(length.by_token, -shares.log2().sum(1), rtol=1e-12, atol=1e-12)


def test_an_outlier_costs_as_much_as_any_other_value():
    """Four million bins between two values of a latent; 512 latents, so that a count per bin would take 16 GiB."""
    f = torch.zeros(8, 512)
    f[0], f[1] = 1.0, 2.0**22
    code = sparse(f)
    length, nearby = code_length(code, 1.0), code_length(code.with_values(code.values.clamp_max(2)), 1.0)
    assert length.bits == nearby.bits
    assert int(length.bins.max()) == 2**22
    assert length.uniform > nearby.uniform


def test_latents_at_random_and_more_latents_cost_more():
    f = made()
    shuffled = torch.stack([row[torch.randperm(len(row), generator=torch.Generator().manual_seed(i))]
                            for i, row in enumerate(f)])  # fmt: skip
    denser = torch.where(f == 0, 0.7 * torch.rand(f.shape, generator=torch.Generator().manual_seed(1)).round(), f)
    bits = [code_length(sparse(values), 0.5).bits for values in (f, shuffled, denser)]
    assert bits[1] > bits[0] + 2
    assert bits[2] > bits[0] + 2


def test_the_width_is_the_coarsest_within_the_limit(monkeypatch):
    monkeypatch.setattr(shared, "CHUNK", 700)  # several chunks, the last one shorter
    f, directions = made(), Directions(12)
    code, limit = sparse(f), 40.0

    def error(width: float) -> float:
        values = torch.where(f == 0, 0, ((f / width).floor() + 0.5) * width)
        return float((f - values).double().square().sum())

    width, found = coarsest_width(directions, f, code, limit)
    assert math.log2(width) * 4 == pytest.approx(round(math.log2(width) * 4), abs=1e-9)
    assert found == pytest.approx(error(width), rel=1e-6)
    assert found <= limit
    assert coarsest_width(directions, f, code, 1.001 * found)[0] == width
    assert coarsest_width(directions, f, code, 0.999 * found)[0] < width
    coarser = [2 ** (i / 4) for i in range(round(4 * math.log2(width)) + 1, 24)]
    assert min(map(error, coarser)) > limit
    assert coarser[-1] > f.abs().max()
    torch.testing.assert_close(rounded(code, width).to_dense(), f, rtol=0, atol=width / 2 + 1e-6)
    assert coarsest_width(directions, f, code, 1e9)[0] >= 2 * float(f.abs().max())
    nothing = coarsest_width(directions, f, code, -1.0)  # no width does: the finest one, with its error
    assert nothing[0] < 1e-6
    assert nothing[1] > 0


@pytest.fixture
def evaluation(stream_of) -> Evaluation:
    sae, random = (SparseAutoencoder(SAEConfig(d_in=128, d_sae=96, k=8), seed=seed) for seed in (1, 2))
    return Evaluation(stream_of(), sae, random)


def test_a_dictionary_is_measured_beside_its_controls(evaluation, monkeypatch):
    limits = []

    def limited(autoencoder, x, code, limit):
        limits.append(limit)
        return coarsest_width(autoencoder, x, code, limit)

    monkeypatch.setattr(module, "coarsest_width", limited)
    result = mdl(evaluation, rows=48)
    assert result["protocol"] == {"tolerance": 1.1, "least": 1e-3, "steps": 4}
    collected = evaluation.labelled(48)
    assert list(result["controls"]) == ["random", "lm_neurons"]
    spread = (collected.x.double() - collected.x.double().mean(0)).square().sum()
    for name, autoencoder in evaluation.autoencoders(collected, mean=False).items():
        scores = result if name == "sae" else result["controls"][name]
        code = autoencoder.encode_sparse(collected.x, collected.pos)
        f, error = code.to_dense(), float((collected.x - autoencoder.decode(code)).double().square().sum())
        assert limits.pop(0) == pytest.approx(max(1.1 * error, 1e-3 * float(spread)), rel=1e-5)
        which, value, uniform = reference(f.numpy().astype(np.float64), scores["width"])
        assert scores["fvu"] == pytest.approx(float(error / spread), rel=1e-5)
        assert scores["fvu"] <= scores["fvu_rounded"] <= 1.1 * scores["fvu"] + 1e-9
        parts = [scores[f"{part}_bits"] for part in ("active", "value", "uniform")]
        assert parts == pytest.approx([which, value, uniform], rel=1e-9)
        assert scores["bits_per_token"] == pytest.approx(which + value)
        assert scores["bits_per_dimension"] == pytest.approx((which + value) / 128)
        assert scores["l0"] == pytest.approx(float((f != 0).sum(1).double().mean()))
    for key in ("bits_per_token", "fvu"):
        found = result["intervals"][key]
        assert found["low"] < result[key] < found["high"]
        assert found["items"] == 48
        random = result["controls"]["random"][key]
        assert found["above_random"]["difference"] == pytest.approx(result[key] - random, abs=1e-9)
    assert json.dumps(mdl(evaluation, rows=48)["intervals"], allow_nan=False) == json.dumps(result["intervals"])


def test_the_dictionary_is_rounded_to_the_error_of_a_control(evaluation):
    result = mdl(evaluation, rows=48)
    collected, equal = evaluation.labelled(48), result["at_fvu_of"]
    assert list(equal) == list(result["controls"])
    code = collected.code(evaluation.sae)
    spread = (collected.x.double() - collected.x.double().mean(0)).square().sum()
    reached = 0
    for name, found in equal.items():
        limit = 1.1 * result["controls"][name]["fvu"]
        if found is None:
            assert result["fvu"] > limit
            continue
        fvu = [
            float((collected.x - evaluation.sae.decode(rounded(code, width))).double().square().sum() / spread)
            for width in (found["width"], found["width"] * 2 ** (1 / 4))
        ]
        assert fvu[0] <= limit < fvu[1]
        assert found["bits_per_token"] == code_length(code, found["width"]).bits
        reached += 1
    assert reached


def test_lengths_do_not_depend_on_the_norms_of_the_decoder(evaluation):
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=96, activation="relu"), seed=1)
    scaled = SparseAutoencoder(sae.cfg, seed=1)
    with torch.no_grad():
        by = 10 ** torch.linspace(-1, 1, 96)[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
        scaled.W_dec.mul_(by[:, None])
        scaled.W_enc.div_(by)
        scaled.b_enc.div_(by)
    one, other = (mdl(evaluation.of(dictionary, None), rows=24) for dictionary in (sae, scaled))
    assert one["width"] == other["width"]
    for key in ("bits_per_token", "value_bits", "uniform_bits", "fvu_rounded"):
        assert one[key] == pytest.approx(other[key], rel=2e-4)


def test_a_better_reconstruction_may_cost_at_most_a_thousandth(evaluation):
    """The k largest activations with k = D are all of them: no error, so the limit is `LEAST`."""
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=160, k=128), seed=1)
    neurons = mdl(evaluation.of(sae, None), rows=8)["controls"]["lm_neurons"]
    assert neurons["fvu"] == 0
    assert 0 < neurons["fvu_rounded"] <= 1e-3


def test_what_never_fires_costs_nothing(evaluation):
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=96, activation="relu"), seed=1)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    result = mdl(evaluation.of(sae, None), rows=8)
    assert (result["bits_per_token"], result["uniform_bits"], result["bins"], result["l0"]) == (0, 0, 0, 0)
    json.dumps(result, allow_nan=False)


def test_rows_are_weighted_by_their_tokens():
    tokens = torch.tensor([[1, 1], [1, 0]])
    texts = TextActivations.of(tokens, tokens.bool(), torch.zeros(3, 4))
    outcomes = module._by_row(texts, torch.tensor([1.0, 2.0, 6.0]), torch.ones(3))
    assert isinstance(outcomes, Outcomes)
    assert (outcomes.gained.tolist(), outcomes.counted.tolist()) == ([[3.0], [6.0]], [[2.0], [1.0]])
    assert outcomes.score == 3.0


def test_a_transcoder_is_refused(stream_of):
    cfg = SAEConfig(d_in=128, d_out=128, d_sae=96, k=8)
    with pytest.raises(UserError, match="transcoder"):
        mdl(Evaluation(stream_of(), SparseAutoencoder(cfg), None))
    assert "transcoder" in missing_inputs("mdl", stream_of(), cfg, (), {})[""]
    assert missing_inputs("mdl", stream_of(), SAEConfig(d_in=128, d_sae=96, k=8), (), {}) == {}
