"""The same function scores the same, however it is written: in every eval, the dashboard and the feature store."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from temposae.engine import interchange
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig
from temposae.engine.metrics import held_out_scores
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.storage.checkpoint import find
from temposae.engine.stream import ActivationStream, ArraySource
from temposae.evals import features
from temposae.evals.core import core
from temposae.evals.dashboard import dashboard
from temposae.evals.evaluation import Evaluation, Reference, collect
from temposae.evals.pooling import pooled_latents
from temposae.evals.suite import EVALS, load_eval
from temposae.evals.unlearning import clamp

from .probe_data import by_length, write_set

D, F, HOOK = 128, 48, "blocks.1.hook_resid_post"
SLOW = ("sparse_probing", "positions", "ground_truth", "unlearning", "scr", "ravel", "meta_structure")
FORMATS = {"saelens": "relu", "dictionary_learning": "jumprelu", "gemma-scope": "jumprelu", "sparsify": "topk"}


def made(activation: Any, norms: str) -> SparseAutoencoder:
    """Sparse on the embedded model. `norms` "one" is as it is trained; with "many", rows have norms from 0.1 to 10 and the
    encoder makes up for them; with "powers", the nearest powers of two; with "two" or "seven", which commute with top-k, all
    have norm 2 or 7."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation=activation, k=6), seed=3)
    by = torch.ones(F)
    if norms != "one":
        spread = 10 ** torch.linspace(-1, 1, F)
        spread = spread.log2().round().exp2() if norms == "powers" else spread
        factor = {"two": 2, "seven": 7}.get(norms)
        by = factor * by if factor else spread[torch.randperm(F, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        sae.b_enc.fill_(-2.0)
        if activation in ("batchtopk", "jumprelu"):
            sae.threshold.fill_(1.0)
            sae.threshold.div_(by if activation == "jumprelu" else by[0])
        sae.b_enc.div_(by)
        sae.W_enc.div_(by)
        sae.W_dec.mul_(by[:, None])
    return sae


def same(a: Any, b: Any, place: str = "") -> None:
    """Figures agree; what isn't a number is equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in ("seconds", "of", "speed", "dictionary"):
                same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for nth, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{place}[{nth}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, rel_tol=2e-4, abs_tol=2e-5), f"{place}: {a} {b}"
    else:
        assert a == b, place


@pytest.fixture(scope="module")
def evaluation(testbed, tmp_path_factory) -> Evaluation:
    stream = ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=32), model=testbed, seed=0)
    write_set(texts := tmp_path_factory.mktemp("texts"), "7_length", by_length(240))
    sets = [f"7_length?path={texts}"]  # for sae_probes
    return Evaluation(stream, made("relu", "one"), None, sets=sets, share=4, neurons=False)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EVALS])
def test_every_eval_gives_the_same_figures(evaluation, name):
    found = []
    # a meta-dictionary's training amplifies rounding, and powers of two are divided out without any
    for norms in ("two", "powers") if name == "meta_structure" else ("one", "many"):
        sae = made("relu", norms)
        found.append(load_eval(name)(evaluation.of(sae, sae, Reference(sae))))
    same(*found)


def test_clamping_writes_the_same(evaluation):
    collected = evaluation.labelled(64)
    sides = [evaluation.of(made("relu", norms), None).sae for norms in ("one", "many")]
    added = [clamp(sae, collected, np.array([1, 5, 30]), 25).added(torch.arange(len(collected)), 128) for sae in sides]
    assert added[0].abs().max() > 1
    torch.testing.assert_close(*added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "norms"), [("jumprelu", "many"), ("topk", "seven"), ("batchtopk", "seven")])
def test_other_activations_give_the_same_figures(evaluation, activation, norms):
    stream = evaluation.stream
    found = [core(stream, made(activation, one), {}, rows=24, ce_rows=8, neurons=False) for one in ("one", norms)]
    assert 0.5 < found[0]["l0"] < F / 2
    same(*found)
    collected = collect(stream, stream.held_out(24))
    pooled = [
        pooled_latents(collected, Evaluation(stream, made(activation, one), None).sae).toarray()
        for one in ("one", norms)
    ]
    np.testing.assert_allclose(*pooled, rtol=1e-4, atol=1e-5)


def test_the_dashboard_and_the_feature_store_show_the_same_activations(evaluation, stream_of, tmp_path):
    boards, stores = [], []
    for norms in ("one", "many"):
        sae = made("relu", norms)
        boards.append(dashboard(evaluation.stream, sae, name="it", count=12, rows=24))
        checkpoint.save(sae, tmp_path / norms)
        store = tmp_path / f"{norms} store"
        features.encode(find(tmp_path / norms), stream_of(repeat=False), store, tokens=600, min_activation=0.5)
        stores.append({k: v.tolist() for k, v in features.read(store).items()})
    same(*boards)
    same(*stores)
    assert len(stores[0]["value"]) > 100


def test_scores_on_held_out_activations_are_the_same():
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(0)) * 2
    found = [held_out_scores(made("relu", norms), ArraySource(x).held_out()) for norms in ("one", "many")]
    assert found[0] is not None
    same(*found)


@pytest.mark.parametrize("to", interchange.WRITTEN)
def test_what_another_library_holds_scores_the_same(evaluation, tmp_path, to):
    """Written with norms of any size, and read as that library's, without what we put beside it."""
    activation = FORMATS[to]
    norms = "seven" if activation == "topk" else "many"
    run = RunConfig(stream=StreamConfig(hook=HOOK), sae=made(activation, norms).cfg)
    folder: Path = tmp_path / "theirs"
    interchange.write(made(activation, norms), folder, to, run)
    (folder / interchange.BESIDE).unlink()
    own = checkpoint.load(folder)
    assert own.W_dec.norm(dim=1).max() > 5
    stream = evaluation.stream
    found = [core(stream, sae, {}, rows=12, ce_rows=4, neurons=False) for sae in (made(activation, "one"), own)]
    same(*found)
    unit = [Evaluation(stream, sae, None).sae for sae in (made(activation, "one"), own)]
    torch.testing.assert_close(unit[0].W_dec, unit[1].W_dec, rtol=1e-5, atol=1e-6)
