"""SAEBench's own functions on our dictionaries: they take them as they are, and find what our evals find."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals import absorption
from temposae.evals.core import core
from temposae.evals.evaluation import collect
from temposae.evals.pooling import pooled_latents
from temposae.evals.probes import Split
from temposae.evals.saebench import ForSAEBench
from temposae.evals.scr_tpp import _difference
from temposae.evals.sparse_probing import best_epoch
from temposae.evals.unlearning import clamp


def dictionary(**settings) -> SparseAutoencoder:
    """With decoder rows of every length, and a bias that matters."""
    sae = SparseAutoencoder(SAEConfig(**{"d_in": 128, "d_sae": 64, "k": 6, "activation": "relu", **settings}), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(64, 1, generator=draw) * 3 + 0.1)
        sae.b_dec.copy_(torch.randn(128, generator=draw))
    return sae


@pytest.fixture
def rows(stream_of) -> Callable[..., Any]:
    """rows(n): a stream, and its first n held-out rows with the activations [n, T, D] that SAEBench would work with, which
    are zero where it looks at nothing."""

    def make(n: int):
        stream = stream_of()
        found = next(stream.held_out(n))
        acts = stream.model.activations(found.tokens)
        return stream, found, acts * stream.read(found)[1][..., None]

    return make


@pytest.mark.parametrize("settings", [{}, {"activation": "topk"}, {"mask": MaskConfig(kind="ranges", positions=128)}])
def test_the_dictionary_is_the_same_with_a_decoder_of_norm_one(settings, saebench, capfd):
    sae = dictionary(**settings)
    x = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    name, found, sparsity = saebench("sae_bench_utils.general_utils").load_and_format_sae(
        "mine", ForSAEBench(sae, StreamConfig(hook="blocks.1.hook_resid_post")), "cpu"
    )
    assert "not normalized" not in capfd.readouterr().err
    assert (name, sparsity) == ("custom_sae", None)
    assert (found.cfg.hook_layer, found.cfg.hook_name, found.cfg.model_name) == (
        1,
        "blocks.1.hook_resid_post",
        "testbed",
    )
    architecture = settings.get("activation", "standard") + ("_ranges_mask" if "mask" in settings else "")
    assert found.cfg.to_dict()["architecture_str"] == architecture
    pos = torch.arange(128).expand(3, 128)
    torch.testing.assert_close(found(x), sae(x, pos), rtol=1e-5, atol=1e-5)
    f, scale = sae.encode(x, pos), sae.W_dec.norm(dim=1)
    torch.testing.assert_close(found.encode(x), f * scale)
    torch.testing.assert_close(found.W_dec * scale[:, None], sae.W_dec.detach())
    if not settings:  # relu: what is encoded follows from the weights alone
        torch.testing.assert_close(
            torch.relu((x - (0 if sae.center is None else sae.b_dec)) @ found.W_enc + found.b_enc), found.encode(x),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert found.to(device="cpu", dtype=torch.bfloat16) is found
    assert {found.dtype, found.W_enc.dtype, found.W_dec.dtype, found.encode(x.bfloat16()).dtype} == {torch.bfloat16}
    assert (found.cfg.dtype, sae.W_dec.dtype) == ("bfloat16", torch.float32)


def test_core_finds_what_ours_finds(saebench, stream_of):
    sae, stream = dictionary(activation="topk"), stream_of(rows_per_forward=16)
    ours = core(
        stream_of(rows_per_forward=12), sae, {}, rows=32, ce_rows=6
    )  # batches of 16, however many rows at a time
    batches = iter(stream.held_out(32))
    special = set(stream.source.special.tolist()) | {stream.model.tokenizer.pad_token_id}
    store = SimpleNamespace(get_batch_tokens=lambda n: next(batches).tokens)
    theirs, of_latents = saebench("evals.core.main").get_sparsity_and_variance_metrics(
        ForSAEBench(sae, stream.config), stream.model.bridge, store, 2,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=16, model_kwargs={}, ignore_tokens=special,
    )  # fmt: skip
    found = {**ours, **ours["saebench"], "cossim": ours["cosine"]}
    assert (
        found["relative_reconstruction_bias"] != ours["relative_reconstruction_bias"]
    )  # theirs is a mean over batches
    for name in (
        "l0", "l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "explained_variance",
        "explained_variance_legacy", "cossim", "mse",
    ):  # fmt: skip
        assert found[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert ours["latents"]["firing_rate"] == pytest.approx(of_latents["feature_density"], abs=1e-6)


def test_mean_latents_are_those_that_ours_are_probed_on(saebench, rows):
    stream, texts, x = rows(8)
    sae = dictionary(activation="topk")
    found = saebench("sae_bench_utils.activation_collection").get_sae_meaned_activations(
        {"class": x}, ForSAEBench(sae, stream.config), 3
    )["class"]
    pooled = torch.from_numpy(pooled_latents(collect(stream, [texts]), sae).toarray()) * sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(found, pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_scr", [False, True])
def test_latents_have_the_effects_that_ours_have(is_scr, saebench, rows):
    """The rule by which latents are chosen for TPP and SCR, and what is left without them."""
    stream, texts, x = rows(12)
    sae = dictionary(activation="topk")
    adapter, module = ForSAEBench(sae, stream.config), saebench("evals.scr_and_tpp.main")
    w = torch.randn(1, 128, generator=torch.Generator().manual_seed(4))
    probe = SimpleNamespace(net=SimpleNamespace(weight=w))
    names = ("male_professor / female_nurse", "female_nurse_data_only") if is_scr else ("0", "1")
    collected = collect(stream, [texts])
    f, y = pooled_latents(collected, sae).toarray().astype(float), np.arange(12) < 6
    with pytest.MonkeyPatch.context() as patch:
        data = lambda acts, class_idx, perform_scr: (x, torch.from_numpy(y).long())
        patch.setattr(saebench("evals.sparse_probing.probe_training"), "prepare_probe_data", data)
        theirs = module.get_effects_per_class_precomputed_acts(adapter, probe, names[0], {}, is_scr, 5).numpy()
    written = sae.W_dec.detach().double().numpy() @ w[0].double().numpy()
    difference = _difference(f, np.arange(12), y)
    ours = np.abs(difference * written) if is_scr else difference.clip(0) * written
    assert (difference < 0).any()
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-5)
    ablated = np.argsort(-ours)[:5]
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[ablated] = True
    left = module.ablated_precomputed_activations(x, adapter, chosen, 5)
    # theirs also takes from the mean what the ablated latents make of the places that are left out, which are zeros there
    kept = stream.read(texts)[1].sum(1, keepdim=True).numpy()
    f += (x.shape[1] - kept) / kept * sae.encode(torch.zeros(1, 128)).detach().double().numpy()
    means = collected.pooled().double().numpy() - f[:, ablated] @ sae.W_dec.detach().double().numpy()[ablated]
    np.testing.assert_allclose(left.numpy(), means, rtol=1e-3, atol=1e-4)


def test_clamping_changes_activations_as_ours_does(saebench, rows):
    stream, texts, _ = rows(6)
    sae = dictionary(activation="topk")
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))  # clamped values are in units of the decoder's rows
    x, latents = stream.model.activations(texts.tokens), np.array([3, 17, 40])
    theirs = saebench("evals.unlearning.utils.intervention").anthropic_clamp_resid_SAE_features(
        x.clone(), None, ForSAEBench(sae, stream.config), latents.tolist(), multiplier=25
    )
    collected = collect(stream, [texts])
    ours = x + clamp(sae, collected, latents, 25).added(torch.arange(6), x.shape[1])
    kept = collected.kept
    assert not torch.equal(x[kept], ours[kept])
    torch.testing.assert_close(theirs[kept], ours[kept], rtol=1e-4, atol=1e-4)


def test_absorption_gives_single_activations(saebench, rows):
    stream, _, x = rows(2)
    module = saebench("evals.absorption.k_sparse_probing")
    adapter = ForSAEBench(dictionary(), stream.config)
    torch.testing.assert_close(module._get_sae_acts(adapter, x[0]), adapter.encode(x[:1])[0])
    masked = ForSAEBench(dictionary(mask=MaskConfig(kind="ranges", positions=128)), stream.config)
    with pytest.raises(UserError, match="pos: needed, because this dictionary has a mask over positions"):
        module._get_sae_acts(masked, x[0])


@pytest.mark.parametrize("seed", range(3))
def test_full_width_probes_reach_what_theirs_reach(saebench, seed):
    """On classes that overlap; their probe starts at random and shuffles in another order."""
    draw = np.random.default_rng(seed)
    y = draw.random(900) < 0.5
    X = draw.normal(size=(900, 40)).astype(np.float32) + 0.25 * y[:, None]
    split = Split(X[:600], y[:600], X[600:], y[600:])
    torch.manual_seed(seed)
    _, theirs = saebench("evals.sparse_probing.probe_training").train_probe_gpu(
        *(torch.from_numpy(part) for part in (split.train_X, split.train_y.astype(int))),
        *(torch.from_numpy(part) for part in (split.test_X, split.test_y.astype(int))),
        dim=40, batch_size=250, epochs=100, lr=1e-2,
    )  # fmt: skip
    assert best_epoch(split, np.random.default_rng(0)) == pytest.approx(theirs, abs=0.02)


def test_main_latents_have_the_weights_that_theirs_have(saebench, monkeypatch):
    """Their probe starts at random, within 1 / sqrt(F), and ours at zero: with enough steps they end alike."""
    monkeypatch.setattr(absorption, "BATCH", 50)
    draw = np.random.default_rng(0)
    letter = draw.integers(0, 5, 900)
    y = letter[:, None] == np.arange(5)
    f = (draw.random((900, 100)) < 0.05) * draw.exponential(2, (900, 100))
    f[:, 0] = draw.normal(30, 10, 900).clip(0)
    for own in range(5):  # two latents each, the second for a part of the words
        f[letter == own, 1 + 2 * own] += 1
        f[:, 2 + 2 * own] = (letter == own) * (draw.random(900) < 0.4)
    torch.manual_seed(0)
    probe = saebench("evals.absorption.k_sparse_probing").train_sparse_multi_probe(
        torch.from_numpy(f).float(), torch.from_numpy(y).long(), torch.device("cpu"), batch_size=50, show_progress=False
    )
    theirs, ours = probe.weights.detach(), torch.from_numpy(absorption.l1_probe(f, y))
    assert [set(row) for row in theirs.topk(2).indices.tolist()] == [set(row) for row in ours.topk(2).indices.tolist()]
    of_letters = slice(0, 11)
    off = (theirs - ours)[:, of_letters].norm() / theirs[:, of_letters].norm()
    assert off < 0.2


def test_what_cannot_be_taken_is_refused(tmp_path):
    with pytest.raises(UserError, match="sae: a transcoder is not allowed"):
        ForSAEBench(SparseAutoencoder(SAEConfig(d_in=8, d_sae=4, k=1, d_out=4)), StreamConfig())
