"""Core metrics on dictionaries whose scores are known beforehand."""

import json

import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage.checkpoint import find, save
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream.token_rows import TextRows
from temposae.engine.train import train
from temposae.evals.core import _error as ratio_error
from temposae.evals.core import core
from temposae.evals.held_out import HeldOut
from temposae.evals.run_evals import evaluate, evaluate_runs

D = 128
FIGURES = (
    "explained_variance",
    "ce_recovered",
    "ce_recovered_over_mean",
    "l0",
    "dead_fraction",
    "per_position",
    "controls",
)


def identity() -> SparseAutoencoder:
    """Latents +x_i and -x_i: it reconstructs everything."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=2 * D, activation="relu"))
    with torch.no_grad():
        both = torch.cat([torch.eye(D), -torch.eye(D)])
        sae.W_dec.copy_(both)
        sae.W_enc.copy_(both.T)
    return sae


def constant(value: torch.Tensor) -> SparseAutoencoder:
    """No latent ever fires; b_dec is all that comes out."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=8, k=2))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(value)
    return sae


def test_an_identity_dictionary_scores_one(stream_of):
    found = core(stream_of(), identity(), {}, rows=16, ce_rows=8)
    assert found["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert found["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert found["ce_recovered_over_mean"] == pytest.approx(1, abs=1e-5)
    assert found["kl_recovered"] == pytest.approx(1, abs=1e-5)
    assert (found["mse"], found["l2_ratio"], found["cosine"]) == pytest.approx((0, 1, 1), abs=1e-5)
    assert found["relative_reconstruction_bias"] == pytest.approx(1, abs=1e-5)
    assert found["saebench"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert found["l0"] == pytest.approx(D, abs=1)
    assert found["dead_fraction"] == 0
    per = found["per_position"]
    assert per["tokens"][0] == 0  # <bos>
    assert per["explained_variance"][0] is None
    assert all(v == pytest.approx(1, abs=1e-4) for v in per["explained_variance"] if v is not None)
    assert all(v == pytest.approx(1, abs=1e-2) for v in per["ce_recovered"] if v is not None)


def test_a_zero_dictionary_recovers_nothing_and_is_dead(stream_of):
    found = core(stream_of(), constant(torch.zeros(D)), {}, rows=16, ce_rows=8)
    assert found["ce_recovered"] == pytest.approx(0, abs=1e-6)
    assert found["kl_recovered"] == pytest.approx(0, abs=1e-6)
    assert (found["l1"], found["l2_norm_out"], found["cosine"]) == (0, 0, 0)
    assert found["relative_reconstruction_bias"] is None
    assert found["explained_variance"] < 0
    assert (found["l0"], found["dead_fraction"]) == (0, 1)
    assert found["firing_rates"]["never"] == 8


def test_predicting_the_mean_scores_zero(stream_of):
    stream = stream_of()
    x = torch.cat([stream.model.activations(r.tokens)[stream.read(r)[1]] for r in stream.held_out(16)])
    found = core(stream, constant(x.mean(0)), {}, rows=16, ce_rows=8)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert found["ce_recovered_over_mean"] == pytest.approx(0, abs=1e-4)
    mean = found["controls"]["mean"]
    for key in ("explained_variance", "ce_recovered", "ce_recovered_over_mean"):
        assert mean[key] == pytest.approx(found[key], abs=1e-4)


def test_figures_are_those_of_the_formulas(stream_of):
    """Against a plain computation over one batch of rows."""
    stream = stream_of()
    sae = train(stream, SAEConfig(d_in=D, d_sae=64, k=4), TrainConfig(tokens=4096, batch=256, control=False)).sae
    found = core(stream, sae, {}, rows=12, ce_rows=12)
    rows = next(stream.text.held_out(12, 12))
    kept = stream.read(rows)[1]
    full = stream.model.activations(rows.tokens)
    x = full[kept]
    f = sae.encode(x)
    x_hat = (f @ sae.W_dec + sae.b_dec).detach()
    spread = (x - x.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(float(1 - (x - x_hat).square().sum() / spread), abs=1e-5)
    assert found["l0"] == pytest.approx(float((f > 0).sum(1).float().mean()), abs=1e-6)
    assert found["dead_fraction"] == pytest.approx(float((~(f > 0).any(0)).float().mean()), abs=1e-6)
    assert found["tokens"] == int(kept.sum())

    errors, mu = (x - x_hat).square().sum(1), x.mean(0)
    assert found["mse"] == pytest.approx(float((x - x_hat).square().mean()), rel=1e-4)
    assert found["l1"] == pytest.approx(float(f.sum(1).mean()), rel=1e-4)
    assert found["l2_ratio"] == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-4)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-4)
    bias = x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean()
    assert found["relative_reconstruction_bias"] == pytest.approx(float(bias), rel=1e-4)
    wrong = 1 - errors.mean() / (x.square().sum(1).mean() - x.square().mean() ** 2)
    legacy = (1 - errors / (x - mu).square().sum(1)).mean()
    theirs = found["saebench"]
    assert theirs["explained_variance"] == pytest.approx(float(wrong), abs=1e-4)
    assert theirs["explained_variance_legacy"] == pytest.approx(float(legacy), abs=1e-4)

    follows = torch.arange(1, 128) < rows.length[:, None]
    counted = kept[:, :-1] & follows
    probabilities = [
        stream.model.logits(rows.tokens, lambda _, value=value: value)[:, :-1][counted].log_softmax(-1)
        for value in (full, full.masked_scatter(kept[..., None], x_hat), full * ~kept[..., None])
    ]
    clean, own, zero = probabilities
    kl = [float((clean.exp() * (clean - other)).sum(-1).mean()) for other in (own, zero)]
    assert (found["kl"]["sae"], found["kl"]["zero"]) == pytest.approx(kl, rel=1e-3)
    assert found["kl_recovered"] == pytest.approx(1 - kl[0] / kl[1], abs=1e-4)

    def ce(value: torch.Tensor | None) -> float:
        spliced = full.clone()
        if value is not None:
            spliced[kept] = value
        losses = stream.model.losses(rows.tokens, lambda _: spliced)
        return float(losses[kept[:, :-1] & follows].mean())

    clean, zero, own = ce(None), ce(torch.zeros_like(x)), ce(x_hat.detach())
    assert found["ce"]["clean"] == pytest.approx(clean, rel=1e-5)
    assert found["ce_recovered"] == pytest.approx((zero - own) / (zero - clean), abs=1e-4)

    at = 40
    here = torch.arange(128).expand(kept.shape)[kept] == at
    mine = 1 - (x - x_hat)[here].square().sum() / (x - x.mean(0))[here].square().sum()
    assert found["per_position"]["explained_variance"][at] == pytest.approx(float(mine), abs=1e-4)
    assert found["per_position"]["l0"][at] == pytest.approx(float((f[here] > 0).sum(1).float().mean()), abs=1e-5)
    dead_here = float((~(f[here] > 0).any(0)).float().mean())
    assert found["per_position"]["dead_fraction"][at] == pytest.approx(dead_here, abs=1e-6)


def test_results_do_not_depend_on_how_rows_are_batched(stream_of, monkeypatch):
    found = []
    for n, logits in ((3, 2**24), (12, 50_000)):
        monkeypatch.setattr("temposae.evals.replacement_loss.LOGITS", logits)
        found.append(core(stream_of(rows_per_forward=n), identity(), {}, rows=12, ce_rows=7))
    for key in FIGURES[:5]:
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-6)
    assert found[0]["ce_rows"] == found[1]["ce_rows"] == 7
    assert found[0]["tokens"] == found[1]["tokens"]


def test_evaluating_a_run_writes_results_and_figures(stream_of, tmp_path):
    stream = stream_of()
    settings = TrainConfig(tokens=8192, batch=256, log_every_steps=4)
    train(stream, SAEConfig(d_in=D, d_sae=64, k=4), settings, out=tmp_path / "run")
    found = evaluate(find(tmp_path / "run"), stream, tmp_path / "run")["core"]
    assert set(found["controls"]) == {"random", "lm_neurons", "mean"}
    assert found["explained_variance"] > found["controls"]["random"]["explained_variance"] > 0
    figures = {p.name: p.stat().st_size for p in (tmp_path / "run" / "figures").iterdir()}
    names = ("loss_curve", "position_explained_variance", "firing_rates")
    assert set(figures) == {f"{name}{kind}" for name in names for kind in (".png", ".pdf")}
    assert min(figures.values()) > 5000
    again = evaluate(find(tmp_path / "run"), stream_of(), None)["core"]
    assert {k: again[k] for k in FIGURES} == {k: found[k] for k in FIGURES}


def short_training(monkeypatch) -> list[str]:
    """From now on evaluation trains controls on few tokens; the decoders of those that it trains."""
    asked = []

    def short(stream, runs):
        asked.extend((run.sae.decoder, run.train.tokens) for run in runs.values())
        settings = TrainConfig(tokens=2048, batch=256, control=False)
        return {name: train(stream, run.sae, settings) for name, run in runs.items()}

    monkeypatch.setattr("temposae.evals.trained_controls.train_together", short)
    return asked


def test_a_dictionary_without_a_control_has_none_unless_it_is_asked_for(stream_of, tmp_path, monkeypatch):
    save(SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4)), tmp_path / "saved")
    asked = short_training(monkeypatch)
    found = evaluate(find(tmp_path / "saved"), stream_of(), None, rows=8)["core"]
    assert (asked, set(found["controls"])) == ([], {"lm_neurons", "mean"})
    assert found["no_random_control"] == "saved has none"
    found = evaluate(find(tmp_path / "saved"), stream_of(), None, rows=8, controls=["random"])["core"]
    assert asked == [("random", 1_000_000)]
    assert set(found["controls"]) == {"random", "lm_neurons", "mean"}
    assert "no_random_control" not in found


@pytest.mark.parametrize("repeat", [True, False])
def test_control_false_means_none_in_results_report_and_figures(stream_of, tmp_path, monkeypatch, repeat):
    """Also where the text has ended, so that none could be trained."""
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(["the cat sat on the mat and the dog ran off"] * 200))
    stream = stream_of(data=str(data), repeat=repeat, buffer_tokens=2048)
    sae, settings = SAEConfig(d_in=D, d_sae=64, k=4), TrainConfig(tokens=512, batch=256, control=False)
    trained = train(stream, sae, settings, out=tmp_path / "run")
    asked = short_training(monkeypatch)
    summary = evaluate_runs(tmp_path, {"run": trained}, stream)["dictionaries"]["run"]
    assert asked == []
    assert set(summary["controls"]) == {"lm_neurons", "mean"}
    assert summary["no_random_control"] == "train.control: false"
    assert "| core | no random control | train.control: false |" in (tmp_path / "run" / "report.md").read_text()


def test_a_dictionary_of_another_width_is_refused(stream_of):
    with pytest.raises(UserError, match="sae: d_in = 64 does not fit; .* width 128"):
        core(stream_of(), SparseAutoencoder(SAEConfig(d_in=64, d_sae=8, k=2)), {})


@pytest.mark.parametrize("how", ["read again", "run whole"])
def test_figures_are_the_same_however_they_are_come_by(stream_of, monkeypatch, how):
    """Text that is not held is read again; a model that can't be cut at the hook runs whole."""
    stream, sae = stream_of(rows_per_forward=5), SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4), seed=1)
    right = core(stream, sae, {}, rows=12, ce_rows=7)
    whole = []
    if how == "read again":
        monkeypatch.setattr("temposae.evals.held_out.HELD", 0)
    else:
        monkeypatch.setattr(type(stream.model), "tail", lambda *_: whole.append(1))
    found = core(stream, sae, {}, rows=12, ce_rows=7)
    assert bool(whole) == (how == "run whole")
    for key in ("explained_variance", "ce_recovered", "kl_recovered", "l0", "mse", "explained_variance_error"):
        assert found[key] == pytest.approx(right[key], rel=1e-5), key
    for key in ("ce", "kl", "saebench"):
        assert found[key] == pytest.approx(right[key], rel=1e-4), key


def test_the_vocabulary_does_not_decide_over_memory(stream_of, monkeypatch):
    """No more logits at once than `LOGITS`, and of activations no more than `HELD` bytes and a pass."""
    from temposae.engine.stream.partial_model import Tail

    stream, sizes = stream_of(rows_per_forward=4), []
    V, real = len(stream.model.tokenizer), Tail.logits
    monkeypatch.setattr("temposae.evals.replacement_loss.LOGITS", 10 * V)
    monkeypatch.setattr(Tail, "logits", lambda self, hidden: sizes.append(len(hidden)) or real(self, hidden))
    monkeypatch.setattr("temposae.evals.held_out.HELD", 4 * 128 * D * 4)
    text = HeldOut(stream, 12, 6)
    assert [len(batch.rows) for batch in text._stored] == [4]
    assert [batch.first for batch in text.batches()] == [0, 4, 8]
    text.replace({})
    assert sizes
    assert max(sizes) == 10


def test_saebench_zeroes_every_position_and_counts_the_last(stream_of):
    stream, sae = stream_of(), SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4), seed=1)
    found = core(stream, sae, {}, rows=6, ce_rows=6)["saebench"]
    rows = next(stream.text.held_out(6, 6))
    acts, kept = stream.read(rows)
    full = next(iter(acts.values()))
    x_hat = full.clone()
    x_hat[kept] = sae(full[kept]).detach()
    clean, own, zero = (
        stream.model.logits(rows.tokens, lambda _, value=value: value).log_softmax(-1)
        for value in (full, x_hat, torch.zeros_like(full))
    )
    kl = {name: (clean.exp() * (clean - other)).sum(-1)[kept].mean() for name, other in (("sae", own), ("zero", zero))}
    assert found["kl_div_with_sae"] == pytest.approx(float(kl["sae"]), rel=1e-3)
    assert found["kl_div_with_ablation"] == pytest.approx(float(kl["zero"]), rel=1e-3)
    follows = kept[:, :-1] & (torch.arange(1, 128) < rows.length[:, None])
    ce = -zero[:, :-1].gather(2, rows.tokens[:, 1:, None])[..., 0][follows].mean()
    assert found["ce_loss_with_ablation"] == pytest.approx(float(ce), rel=1e-4)


def test_standard_errors_are_those_of_a_ratio_over_rows(stream_of):
    """As the jackknife has it, which leaves out a row at a time."""
    above, below = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).double().T + 0.5
    left_out = (above.sum() - above) / (below.sum() - below)
    jackknife = float((199 / 200 * (left_out - left_out.mean()).square().sum()).sqrt())
    assert ratio_error(above, below) == pytest.approx(jackknife, rel=0.02)
    assert ratio_error(above[:1], below[:1]) is None
    few, many = (core(stream_of(), constant(torch.ones(D)), {}, rows=n, ce_rows=n) for n in (8, 32))
    assert many["explained_variance_error"] < few["explained_variance_error"]


def test_ce_of_documents_of_one_token_is_null_with_a_sentence(testbed):
    """`<bos>` doesn't count, and the one token after it has no next one."""
    words = testbed.tokenizer.decode(range(20, 60)).split()
    text = TextRows([words[n % 40] for n in range(400)], testbed.tokenizer, 8, repeat=False)
    config = StreamConfig(buffer_tokens=256, context=8)
    stream = ActivationStream(config, model=testbed, rows=text)
    found = core(stream, SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4)), {}, rows=12, ce_rows=12)
    json.dumps(found, allow_nan=False)
    for one in (found, *found["controls"].values()):
        assert one["ce_recovered"] is None
        assert one["explained_variance"] is not None
    assert found["ce"]["clean"] is None
    assert found["ce_tokens"] == 0
    assert "no token that counts in 12 held-out rows has a next one; CE is not measured" in found["warnings"][0]


def test_activations_that_do_not_vary_have_no_explained_variance(testbed):
    """The embedding of one token, again and again."""
    model = LanguageModel("testbed", hook="blocks.0.hook_resid_pre", device="cpu")
    word = testbed.tokenizer.decode([30]).strip()
    text = TextRows([" ".join([word] * 7)] * 400, model.tokenizer, 8, repeat=False)
    stream = ActivationStream(StreamConfig(buffer_tokens=256, context=8), model=model, rows=text)
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4))
    found = core(stream, sae, {}, rows=12, ce_rows=4)
    json.dumps(found, allow_nan=False)
    for one in (found, *found["controls"].values()):
        assert one["explained_variance"] is None
        assert one["explained_variance_error"] is None
        assert set(one["per_position"]["explained_variance"]) == {None}
    assert "don't vary; there is no variance to explain" in found["warnings"][0]
    with pytest.raises(UserError, match=r"^activations: those at blocks.0.hook_resid_pre don't vary"):
        train(stream, sae.cfg, TrainConfig(tokens=1024, batch=64))
