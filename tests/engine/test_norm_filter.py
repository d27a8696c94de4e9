"""Massive activations are told from ordinary ones, and no source or measurement counts them."""

from pathlib import Path

import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.stream import ActivationStream
from temposae.engine.stream.cache_writer import write_cache
from temposae.engine.stream.norm_filter import NormFilter, describe
from temposae.engine.testbed import training
from temposae.engine.testbed.language import Language
from temposae.engine.train import train
from temposae.evals.core import core
from temposae.evals.dashboard import dashboard
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

D = 32


def acts(n: int = 4000, sigma: float = 0.1, planted: int = 0, ratio: float = 20.0) -> torch.Tensor:
    """Activations [n, D] whose log norms spread by `sigma`, the first `planted` of them `ratio` times as large."""
    draw = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, D, generator=draw), dim=1)
    x *= 50 * (sigma * torch.randn(n, 1, generator=draw)).exp()
    x[:planted] *= ratio
    return x


def found(x: torch.Tensor, max_norm="auto") -> torch.Tensor:
    norms = NormFilter(max_norm)
    return ~norms.calibrate({"hook": x})


@pytest.mark.parametrize("ratio", [8, 150, 1e12])
@pytest.mark.parametrize("share", [0.0003, 0.01, 0.2])
def test_massive_activations_are_found_whatever_their_share(share, ratio):
    planted = max(1, int(4000 * share))
    assert found(acts(planted=planted, ratio=ratio)).nonzero().flatten().tolist() == list(range(planted))


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3, 0.8, 1.5])
def test_norms_that_spread_widely_lose_nothing(sigma):
    assert not found(acts(sigma=sigma)).any()


def test_a_number_is_a_multiple_of_the_median_and_null_turns_the_filter_off():
    x = acts(sigma=0, planted=10, ratio=3)
    assert found(x, 2.9).sum() == 10
    assert not found(x, 3.1).any()
    off = NormFilter(None)
    assert off.knows(["hook"])
    assert off.ordinary({"hook": x}).all()
    assert off.report() is None


def test_a_token_that_is_massive_at_one_hook_is_left_out_at_all():
    norms = NormFilter("auto")
    first, second = acts(planted=3), acts().roll(1, 0)
    second[7] *= 100
    assert (~norms.calibrate({"a": first, "b": second})).nonzero().flatten().tolist() == [0, 1, 2, 7]


def test_what_is_not_finite_comes_through_to_be_named():
    x = acts()
    x[3, 0], x[4, 1], x[5] = torch.nan, torch.inf, 3e38  # the last is finite, and its norm is not
    norms = NormFilter("auto")
    norms.calibrate({"hook": x})
    assert (~norms.ordinary({"hook": x})).nonzero().flatten().tolist() == [5]


def test_the_report_names_share_positions_and_variance():
    norms, x = NormFilter("auto"), acts(planted=40, ratio=150)
    assert describe(norms.report()) is None
    massive = ~norms.calibrate({"hook": x})
    norms.count(4000, (torch.arange(4000) % 8)[massive])
    report = norms.report()
    assert report is not None
    assert report["share"] == 0.01
    assert report["positions"] == {str(p): 5 for p in range(8)}
    assert report["variance_share"]["hook"] == pytest.approx(0.995, abs=0.003)
    median = float(x.norm(dim=1).median())
    held = f"{report['variance_share']['hook']:.1%}"
    assert describe(norms.report()) == (
        f"massive activations: 40 of 4,000 tokens (1.0%), which hold {held} of the variance, are left out: norm above "
        f"{4 * median:.4g} (4 x the median); at positions 0 (12%), 1 (12%), 2 (12%), 3 (12%), 4 (12%) and 3 more "
        "(stream.max_norm)"
    )
    again, resumed = NormFilter("auto"), NormFilter("auto")
    again.load_report(report)
    resumed.load_state(norms.state())
    assert again.report() == resumed.report() == report
    other = NormFilter(3.0)
    other.load_report(report)  # of another rule
    assert not other.knows(["hook"])
    assert describe(None) is None


def folder(place: Path, kind: type) -> tuple[str, str]:
    """A random model of an architecture in which the word that opens half of the documents, and one in the middle of some,
    have a massive activation; its folder, and a text."""
    language = Language()
    sizes = dict(hidden_size=D, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=128)
    more: dict = {"bos_token_id": 1, "eos_token_id": 2}
    if kind is not GPT2Config:
        more |= dict(intermediate_size=64, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(language.vocabulary), **sizes, **more))
    texts = [language.document(i).text.split()[:55] for i in range(400)]  # a row each
    sink = texts[0][0]
    texts = [[sink, *words[1:]] if i % 2 else [*words[:30], sink, *words[30:]] for i, words in enumerate(texts)]
    with torch.no_grad():
        model.get_input_embeddings().weight[language.vocabulary.index(sink)] *= 3000
    model.save_pretrained(place)
    training.tokenizer(language).save_pretrained(place)
    text = place / "text.txt"
    text.write_text("\n\n".join(map(" ".join, texts)))
    return str(place), str(text)


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (GPT2Config, LlamaConfig)), Gemma3TextConfig],
)
def test_training_and_measuring_agree_on_ordinary_tokens(tmp_path, kind):
    """Every source and every measurement leaves the same tokens out, with <bos> or without; off, they spoil the scores."""
    name, text = folder(tmp_path / "model", kind)
    settings = {"model": name, "data": text, "context": 64, "rows_per_forward": 16, "buffer_tokens": 2048}
    sae = SAEConfig(d_in=D, d_sae=128, k=8, activation="batchtopk")
    training_ = TrainConfig(tokens=12_000, batch=256, lr=2e-3)
    scores, limits = {}, {}
    for label, more in {"bos": {}, "no bos": {"bos": False}, "off": {"max_norm": None}}.items():
        stream = ActivationStream(StreamConfig(**settings, **more), tokens=12_000, batch=256)
        run = train(stream, sae, training_, out=tmp_path / label)
        assert run.random is not None
        scores[label] = core(stream, run.sae, {"random": run.random}, rows=20, ce_rows=4)
        limits[label] = checkpoint.find(tmp_path / label).massive
        if label == "off":
            assert limits[label] is None
            continue
        fvu = [line["fvu"] for line in run.metrics[2:]]
        assert max(fvu) < 2 * fvu[0]
        places = limits[label]["positions"]
        assert limits[label]["share"] > 0.008
        assert max(places, key=places.get) == ("1" if label == "bos" else "0")
        fresh = ActivationStream(StreamConfig(**settings, **more), tokens=1)  # as `temposae eval` begins
        fresh.norms.load_report(limits[label])
        rows = next(fresh.held_out(8))
        read, kept = fresh.read(rows)
        norm = next(iter(read.values())).norm(dim=-1)
        assert norm[kept].max() < 4 * norm[kept].median()
        seen = torch.arange(64) < rows.length[:, None]
        assert (norm[seen & ~kept] > 50 * norm[kept].median()).sum() >= 4
        shown = dashboard(fresh, run.sae, name="run", count=20, rows=8)
        massive = {tuple(place) for place in (seen & ~kept).nonzero().tolist()}
        number = {int(row): i for i, row in enumerate(rows.row)}
        for latent in shown["latents"]:
            for context in latent["strongest"] + latent["ordinary"]:
                assert (number[context["row"]], context["position"]) not in massive
    for label in ("bos", "no bos"):
        own = scores[label]
        assert abs(own["l0"] / sae.k - 1) < 0.05
        assert own["explained_variance"] > own["controls"]["random"]["explained_variance"]
        assert own["massive"]["share"] == limits[label]["share"]
    assert scores["off"]["explained_variance"] > 0.99  # of a few tokens, which says nothing of the others
    write_cache(tmp_path / "cache", StreamConfig(**settings), 9000, hooks=[scores["bos"]["hook"]])
    cached = ActivationStream(StreamConfig(cache=str(tmp_path / "cache"), buffer_tokens=2048), tokens=4000, batch=256)
    for _ in range(8):
        norm = cached.next(256).x.float().norm(dim=1)
        assert norm.max() < 4 * norm.median()


def test_own_activations_are_filtered_in_training_and_in_held_out_scores():
    x = acts(4000)
    x[::50] *= 100  # the held-out twentieth has some as well
    run = train(x, SAEConfig(d_in=D, d_sae=64, k=8), TrainConfig(tokens=8000, batch=256, lr=2e-3))
    assert run.massive is not None
    assert run.massive["massive"] > 0
    assert run.held_out is not None
    assert run.held_out["sae"]["tokens"] == 200 - 4


def test_the_setting_is_auto_off_or_a_number_above_one():
    assert StreamConfig().max_norm == "auto"
    assert [StreamConfig(max_norm=given).max_norm for given in ("auto", None, "off", False, 10, 2.5)] == [
        "auto", None, None, None, 10.0, 2.5,
    ]  # fmt: skip
    allowed = "it must be auto, off, or a number greater than 1 and at most 1e9"
    for given in (0.5, 1, -3, float("nan"), float("inf"), True, "ten", [4]):
        with pytest.raises(UserError, match=rf"^stream.max_norm: .* is not allowed; {allowed}$"):
            StreamConfig(max_norm=given)
