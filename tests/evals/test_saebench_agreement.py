"""Our evals beside SAEBench 0.6.0's own functions, on the same activations and labels. docs/evals.md lists what is compared.

Sums are float32 there and float64 here, so figures differ by rounding: a few 1e-5. Accuracies are equal.
"""

import inspect
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array
from temposae.evals import absorption, scr_tpp, unlearning
from temposae.evals.ablation_recipes import RECIPES, Task, saebench_probe
from temposae.evals.class_sets import Latents
from temposae.evals.core import core
from temposae.evals.evaluation import Evaluation, collect
from temposae.evals.probes import Split, balanced, columns, right
from temposae.evals.saebench import ForSAEBench, output
from temposae.evals.scr_tpp import _biased_and_even, _halves, scr, tpp
from temposae.evals.unlearning import _choice

from .test_saebench_runners import dictionary

NS = [2, 5, 10, 20, 50]  # F = 64


def test_losses_with_the_activation_replaced(saebench, stream_of):
    """CE and KL of the reconstruction, of zeros and of the clean model, and both scores."""
    sae, stream = dictionary(activation="topk"), stream_of(rows_per_forward=16)
    ours = core(stream_of(rows_per_forward=12), sae, {}, rows=32, ce_rows=32)
    special = set(stream.source.special.tolist()) | {stream.model.tokenizer.pad_token_id}
    batches, model = iter(stream.held_out(32)), stream.model.bridge

    class Model:
        """Logits and losses per token, by the names that SAEBench calls."""

        def __call__(self, tokens, **_: Any) -> Any:
            return self._both(model(tokens, return_type="logits"), tokens)

        def run_with_hooks(self, tokens, fwd_hooks, **_: Any) -> Any:
            return self._both(model.run_with_hooks(tokens, return_type="logits", fwd_hooks=fwd_hooks), tokens)

        def _both(self, logits, tokens) -> Any:
            losses = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            return logits, losses

    theirs = saebench("evals.core.main").get_downstream_reconstruction_metrics(
        ForSAEBench(sae, stream.config), Model(), SimpleNamespace(get_batch_tokens=lambda n: next(batches).tokens),
        compute_kl=True, compute_ce_loss=True, n_batches=2, eval_batch_size_prompts=16, ignore_tokens=special,
        exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    found = {**ours["saebench"], "ce_loss_with_sae": ours["ce"]["sae"], "ce_loss_without_sae": ours["ce"]["clean"]}
    for name, value in theirs.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert len(theirs) == 7


def test_figures_of_weights_and_densities(saebench, stream_of):
    sae, stream = dictionary(activation="topk"), stream_of()
    result = core(stream, sae, {}, rows=16, ce_rows=4)
    about = {"sae_id": "run", "llm_dtype": "float32", "training_tokens": None}
    written = output("core", json.loads(json.dumps(result)), sae, stream.config, **about)
    adapter, module = ForSAEBench(sae, stream.config), saebench("evals.core.main")
    adapter.cfg.architecture_str = "standard"
    with torch.no_grad():
        theirs = module.get_featurewise_weight_based_metrics(adapter)
    for name, values in theirs.items():
        assert [latent[name] for latent in written["eval_result_details"]] == pytest.approx(values, abs=1e-5), name
    densities = [latent["feature_density"] for latent in written["eval_result_details"]]
    misc = module.calculate_misc_metrics(theirs | {"feature_density": densities})
    assert written["eval_result_metrics"]["misc_metrics"] == pytest.approx(misc, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_probes_are_right_on_the_same_share(saebench, seed):
    """The same latents are selected, and the probe on them has the same accuracy."""
    module, draw = saebench("evals.sparse_probing.probe_training"), np.random.default_rng(seed)
    y = draw.random(400) < 0.5
    X = ((draw.random((400, 60)) < 0.2) * draw.exponential(2, (400, 60))).astype(np.float32)
    X[:, :8] += 0.4 * y[:, None]
    split = Split(X[:250], y[:250], X[250:], y[250:])
    tensors = [torch.from_numpy(part) for part in (X[:250], y[:250].astype(int), X[250:], y[250:].astype(int))]
    for k in (1, 2, 5, 20):
        mask = module.get_top_k_mean_diff_mask(tensors[0], tensors[1], k)
        ours = columns(split, k)
        assert set(torch.nonzero(~mask)[:, 0].tolist()) == set(ours.tolist())
        train, test = (module.apply_topk_mask_reduce_dim(part, mask) for part in (tensors[0], tensors[2]))
        _, theirs = module.train_sklearn_probe(train, tensors[1], test, tensors[3])
        assert right(split, ours).mean() == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_probes_of_scr_and_tpp_are_the_same(saebench, seed):
    """Their probe draws from torch's global generator, ours from its own: equal seeds give equal probes."""
    module, draw = saebench("evals.sparse_probing.probe_training"), np.random.default_rng(seed)
    y = draw.random(300) < 0.5
    X = (draw.normal(size=(300, 40)) + 0.3 * y[:, None]).astype(np.float32)
    task = Task(X[:200], y[:200], X[200:], y[200:])
    w, b = saebench_probe(task, seed)
    torch.manual_seed(seed)
    probe, _ = module.train_probe_gpu(
        *(torch.from_numpy(part) for part in (X[:200], y[:200].astype(int), X[200:], y[200:].astype(int))),
        dim=40, batch_size=16, epochs=20, lr=1e-3, l1_penalty=1e-3, early_stopping_patience=20,
    )  # fmt: skip
    np.testing.assert_allclose(w, probe.net.weight[0].detach(), atol=1e-5)
    assert b == pytest.approx(probe.net.bias.item(), abs=1e-5)


def test_as_many_latents_are_ablated(saebench):
    """Positive effects first, then as many zeros as there are negative ones. Any zeros may be taken; ours are the first."""
    module, effects = saebench("evals.scr_and_tpp.main"), np.array([0, -1, 3, 0, 0, 2, -4, 1.0])
    order = RECIPES["saebench"].order(effects)
    for n in range(1, 9):
        theirs = module.select_top_n_features(torch.from_numpy(effects), n, "a")
        assert int(theirs.sum()) == len(order[:n]) == min(n, 5)
        assert set(effects[order[:n]]) == set(effects[theirs.numpy()])
    own = RECIPES["temposae"].order(effects)
    assert effects[own].tolist() == [3, 2, 1, -1, -4]


def first_of_equals(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk takes any of equal effects; here the first, as ours does."""
    order = torch.argsort(values, descending=True, stable=True)[:k]
    return values[order], order


class Theirs:
    """SAEBench's run of SCR or TPP on activations [R, T, D]: the rows of each class (or probe), and their labels."""

    def __init__(self, saebench, adapter, is_scr: bool):
        self.probing, self.main = saebench("evals.sparse_probing.probe_training"), saebench("evals.scr_and_tpp.main")
        self.pool = saebench("sae_bench_utils.activation_collection").create_meaned_model_activations
        self.adapter, self.is_scr = adapter, is_scr

    def run(self, train: dict, test: dict, train_y: dict, test_y: dict, seeds: dict[str, int]) -> dict[str, float]:
        names, pooled = list(train_y), (self.pool(train), self.pool(test))
        of_training = {id(train), id(pooled[0])}

        def data(acts, name, perform_scr=False):
            labels = train_y if id(acts) in of_training else test_y
            return acts[name], torch.from_numpy(labels[name]).int()

        fit, order = self.probing.train_probe_gpu, iter(names)

        def seeded(*given, **settings):
            torch.manual_seed(seeds[next(order)])
            return fit(*given, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.probing, "prepare_probe_data", data)
            patch.setattr(self.probing, "train_probe_gpu", seeded)
            patch.setattr(torch, "topk", first_of_equals)
            probes, _ = self.probing.train_probe_on_activations(
                *pooled, use_sklearn=False, batch_size=16, epochs=20, lr=1e-3, perform_scr=self.is_scr,
                early_stopping_patience=20, l1_penalty=1e-3,
            )  # fmt: skip
            torch.set_grad_enabled(False)
            try:
                clean = self.main.get_probe_test_accuracy(probes, names, pooled[1], 500, self.is_scr)
                effects = self.main.get_all_node_effects_for_one_sae(self.adapter, probes, names, self.is_scr, train, 7)
                after = self.main.perform_feature_ablations(
                    probes, self.adapter, 7, test, effects, NS, names, 500, self.is_scr
                )
            finally:
                torch.set_grad_enabled(True)
        if self.is_scr:
            return self.main.get_scr_plotting_dict(after, clean)
        return self.main.create_tpp_plotting_dict(after, clean)[0]


@pytest.fixture
def documents(stream_of):
    """An evaluation by SAEBench's protocol, and activations [R, T, D] of its documents, zero where nothing is read."""
    stream = stream_of()
    sae = dictionary(activation="topk")
    evaluation = Evaluation(stream, sae, None, neurons=False)
    evaluation.protocol = "saebench"
    collected = evaluation.labelled(256)
    acts = torch.zeros(*collected.kept.shape, 128)
    acts[collected.kept] = collected.x
    return evaluation, collected, acts, ForSAEBench(sae, stream.config)


def seeds_of(evaluation: Evaluation, purpose: str, names: list[str]) -> dict[str, int]:
    draw = evaluation.generator(purpose)
    return {name: int(draw.integers(2**62)) for name in names}


def test_tpp_is_theirs(saebench, documents):
    evaluation, collected, acts, adapter = documents
    topic = collected.row_label("topic").numpy()
    names, theirs = [str(c) for c in range(8)], []
    for seed in range(2):
        draw = evaluation.generator(f"tpp {seed}")
        sides = map(np.concatenate, zip(*_halves(topic, range(8), draw), strict=True))
        rows = [[side[balanced(topic[side] == c, draw, groups=topic[side])] for c in range(8)] for side in sides]
        labels = [
            {name: topic[of_class] == int(name) for name, of_class in zip(names, side, strict=True)} for side in rows
        ]
        tensors = [{name: acts[of_class] for name, of_class in zip(names, side, strict=True)} for side in rows]
        seeds = seeds_of(evaluation, f"tpp {seed} probes", names)
        theirs.append(Theirs(saebench, adapter, False).run(*tensors, *labels, seeds))
    ours = tpp(evaluation, rows=256, seeds=2)
    assert any(ours["tpp"][n]["total_metric"] > 0.02 for n in NS)
    for n in NS:
        for key, value in ours["tpp"][n].items():
            expected = np.mean([run[f"tpp_threshold_{n}_{key}"] for run in theirs])
            assert value == pytest.approx(expected, abs=1e-6), (n, key)


def test_scr_is_theirs(saebench, documents):
    evaluation, collected, acts, adapter = documents
    topic, tone = (collected.row_label(name).numpy() for name in ("topic", "tone"))
    names = ["male_professor / female_nurse", "professor / nurse", "male / female"]
    metrics: dict[str, list[float]] = {}
    for seed in range(2):
        for index, pair in enumerate(((0, 1), (2, 3), (4, 5), (6, 7))):
            draw = evaluation.generator(f"scr {seed} {index}")
            groups = _halves(2 * topic + tone, [2 * c + value for c in pair for value in (0, 1)], draw)
            sides = [_biased_and_even([group[side] for group in groups], True) for side in (0, 1)]
            rows = [dict(zip(names, (biased, even, even), strict=True)) for biased, even in sides]
            classes = {names[0]: topic == pair[1], names[1]: topic == pair[1], names[2]: tone == 1}
            labels = [{name: classes[name][of_probe] for name, of_probe in side.items()} for side in rows]
            tensors = [{name: acts[of_probe] for name, of_probe in side.items()} for side in rows]
            seeds = seeds_of(evaluation, f"scr {seed} {index} probes", names)
            for key, value in Theirs(saebench, adapter, True).run(*tensors, *labels, seeds).items():
                metrics.setdefault(key, []).append(value)
    ours = scr(evaluation, rows=256, seeds=2)
    assert any(abs(ours["scr_dir2"][n]) + abs(ours["scr_dir1"][n]) > 0.02 for n in NS)
    for n in NS:
        for key in ("scr_metric", "scr_dir1", "scr_dir2"):
            expected = metrics.get(f"{key}_threshold_{n}")
            assert ours[key][n] == (None if expected is None else pytest.approx(np.mean(expected), abs=1e-5)), (n, key)


@pytest.mark.parametrize(
    ("base", "clean", "after"),
    [
        ((0.5, 0.9), (0.8, 0.9), (0.6, 0.7)),
        ((0.7, 0.7), (0.8, 0.9), (0.9, 0.9)),
        ((0.9, 0.6), (0.9005, 0.95), (0.1, 0.8)),
    ],
)
def test_gaps_are_scored_by_their_rule(saebench, base, clean, after):
    """Of class and attribute: accuracies of the biased probe, of clean probes, and after ablation."""
    biased, names = "male_professor / female_nurse", ("professor / nurse", "male / female")
    combined = [f"{biased} probe on {name} data" for name in names]
    accuracies = dict(zip(names, clean, strict=True)) | dict(zip(combined, base, strict=True))
    ablated = {names[1]: {2: {combined[0]: after[0]}}, names[0]: {2: {combined[1]: after[1]}}}
    theirs = saebench("evals.scr_and_tpp.main").get_scr_plotting_dict(ablated, accuracies)
    everyone = np.ones(1000, bool)

    def logits(accuracy: float) -> np.ndarray:
        return np.where(np.arange(1000) < round(accuracy * 1000), 1.0, -1.0)

    removal = scr_tpp._Removal(
        RECIPES["saebench"], [2], [everyone, everyone], *(np.arange(1000),) * 2, np.ones((3, 1)), logits(1), list(clean),
        list(base),
    )  # fmt: skip
    left = iter([after[i] for i in (0, 1) if clean[i] - base[i] >= 0.001])
    with pytest.MonkeyPatch.context() as patch:  # one latent, whose ablation leaves this share right
        patch.setattr(scr_tpp, "_difference", lambda *_: np.ones(1))
        patch.setattr(scr_tpp, "_ablation", lambda *_: lambda chosen: (1 - logits(next(left)))[:, None])
        ours, _ = removal.scores(Latents(csc_array(np.ones((1000, 1))), np.ones((1, 1))), None)
    for column, key in enumerate(("scr_metric", "scr_dir1", "scr_dir2")):
        expected = theirs.get(f"{key}_threshold_2")
        assert np.isnan(ours[0, column]) if expected is None else ours[0, column] == pytest.approx(expected)
    assert ("scr_metric_threshold_2" in theirs) == (base[0] != base[1])


def test_absorption_of_words(saebench):
    """Full absorption and the fraction, word by word, for main latents that fire and don't."""
    draw = np.random.default_rng(0)
    sae = dictionary()
    adapter = ForSAEBench(sae, SimpleNamespace(model="m", hook="blocks.1.hook_resid_post", bos=True, context=8))
    W_dec = adapter.W_dec.detach().numpy()
    p = torch.from_numpy(draw.normal(size=128)).float()
    x = torch.from_numpy(draw.normal(size=(300, 128))).float() + 0.5 * torch.from_numpy(
        W_dec[draw.integers(0, 64, 300)]
    )
    x += torch.from_numpy(draw.uniform(0, 1, (300, 1))).float() * p
    unit = p / p.norm()
    main = [int(i) for i in torch.from_numpy(W_dec).matmul(unit).topk(8).indices[[2, 5]]]
    served = iter(x.split(10))
    model = SimpleNamespace(
        run_with_cache=lambda prompts, names_filter: (None, {names_filter[0]: next(served)[:, None].expand(-1, 2, -1)}),
        to_tokens=lambda prompt: torch.zeros(1, 5),
    )
    module = saebench("evals.absorption.feature_absorption_calculator")
    calculator = module.FeatureAbsorptionCalculator(
        model=model, icl_word_list=["one", "two", "three"], max_icl_examples=1
    )
    theirs = calculator.calculate_absorption(adapter, [f"w{n}" for n in range(300)], p, main, 1, show_progress=False)
    f = adapter.encode(x).detach().numpy()
    absorbed = [word.is_full_absorption for word in theirs.word_results]
    fraction = np.mean([word.absorption_fraction for word in theirs.word_results])
    scores, ours = absorption._absorbed(x.numpy(), f, W_dec, p.numpy(), np.array(main))
    assert ours.tolist() == absorbed
    assert 0 < sum(absorbed) < 300
    assert scores["absorption_fraction"] == pytest.approx(fraction, abs=1e-5)


def test_latents_fire_on_the_same_share_of_tokens(saebench, stream_of):
    """The shares by which unlearning chooses latents."""
    sae, stream = dictionary(activation="topk"), stream_of()
    evaluation = Evaluation(stream, sae, None, neurons=False)
    texts = next(stream.held_out(12))
    x, adapter = stream.model.activations(texts.tokens), ForSAEBench(sae, stream.config)
    served = iter(x.split(5))
    model = SimpleNamespace(
        tokenizer=stream.model.tokenizer,
        run_with_cache=lambda *_, names_filter, **__: (None, {names_filter: next(served)}),
    )
    counted = saebench("sae_bench_utils.activation_collection").get_feature_activation_sparsity
    theirs = inspect.unwrap(counted)(  # it would check the type of the model
        texts.tokens, model, adapter, 5, 1, stream.model.hook, mask_bos_pad_eos_tokens=True
    )
    collected = collect(stream, [texts])
    groups = unlearning._TokenGroups(collected, collected.kept, ~collected.kept, ~collected.kept)
    task: Any = SimpleNamespace(batches=lambda loss: iter([groups]))
    shares, _ = unlearning._fractions({"sae": evaluation.sae}, task)
    np.testing.assert_allclose(shares["sae"][0], theirs, atol=1e-6)


def test_latents_to_clamp_are_theirs(saebench):
    draw = np.random.default_rng(0)
    forget, retain = draw.permutation(np.linspace(0, 0.5, 200)), draw.exponential(0.01, 200)
    retain[:20] = 0.01  # at the threshold
    for threshold in (0.001, 0.01, 0.1):
        theirs = saebench("evals.unlearning.utils.feature_activation").get_top_features(forget, retain, threshold)
        for n in (1, 10, 200):
            assert _choice(forget, retain, threshold, n).tolist() == theirs[:n].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_score_of_settings_is_theirs(saebench, monkeypatch, seed):
    """Of accuracies drawn around the bound of 0.99, the bound itself included."""
    import pandas as pd

    draw = np.random.default_rng(seed)
    forget, retain = draw.integers(0, 20, 8) / 20, draw.integers(97, 101, 8) / 100
    table = iter(zip(forget, retain, strict=True))
    monkeypatch.setattr(unlearning, "_accuracies", lambda *_: (*next(table), np.zeros(3)))
    grid = [(0.01, n, 25.0) for n in range(1, 9)]
    task = SimpleNamespace(questions=SimpleNamespace(forget=np.ones(3)))
    result, _ = unlearning._scores(task, None, lambda threshold, n: np.arange(n), grid, full=True)
    frame = pd.DataFrame({"wmdp-bio": forget, "all_side_effects_mcq": retain})
    assert result["score"] == pytest.approx(saebench("evals.unlearning.main").get_unlearning_scores(frame))
