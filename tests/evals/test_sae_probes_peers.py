"""The package sae-probes as the oracle: the same rows, the same latents and the same figures of its probes.

Its modules are read one by one, because the package imports libraries that the probes don't need.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from temposae.evals.probe_sets import QUICK, load, probe_sets
from temposae.evals.tuned_probes import by_difference, fit, scores_of, split_rows

pytestmark = pytest.mark.slow
SEED = 42  # the package's
EMPTY = ("xgboost", "sae_lens", "sae_probes.generate_model_activations", "sae_probes.generate_sae_activations")


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    """package(name): one of its modules, with empty ones in the place of `EMPTY`."""
    spec = find_spec("sae_probes")
    if spec is None:
        pytest.skip("sae_probes is not installed")
    (folder,) = spec.submodule_search_locations or ()

    def module(name: str) -> ModuleType:
        own = spec_from_file_location(f"sae_probes.{name}", Path(folder) / f"{name}.py")
        assert own is not None
        assert own.loader is not None
        loaded = module_from_spec(own)
        patch.setitem(sys.modules, f"sae_probes.{name}", loaded)
        own.loader.exec_module(loaded)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        root = ModuleType("sae_probes")
        root.__path__, root.__spec__ = [folder], spec
        patch.setitem(sys.modules, "sae_probes", root)
        for name in EMPTY:
            empty = ModuleType(name)
            empty.__getattr__ = lambda _: None  # type: ignore[method-assign]
            patch.setitem(sys.modules, name, empty)
        yield module


def latents(n: int, F: int, y: np.ndarray) -> np.ndarray:
    """Sparse latents float32 [n, F], of which the first ten are more often active in the class."""
    draw = np.random.default_rng(0)
    rate = np.where(np.arange(F) < 10, 0.1 + 0.35 * y[:, None], 0.1)
    return (5 * draw.random((n, F)) * (draw.random((n, F)) < rate)).astype(np.float32)


def test_its_data_sets_are_these(package):
    data = package("utils_data")
    names = [found.name for found in probe_sets(["all"])]
    assert sorted(names) == sorted(data.get_numbered_binary_tags())
    assert len(names) == 113
    assert [found.name for found in probe_sets([])] == list(QUICK)


def test_rows_texts_and_labels_are_the_same(package):
    data = package("utils_data")
    for found in probe_sets([])[:3]:
        labelled, frame = load(found, np.random.default_rng(0)), data.read_numbered_dataset_df(found.name)
        assert labelled.texts == frame["prompt"].tolist()
        y, labels = data.get_yvals(found.name), np.array(labelled.labels)
        assert set(labels[y == 1]).isdisjoint(labels[y == 0])
        train = min(len(y) - 100, 1024)
        theirs = data.get_train_test_indices(y, train, len(y) - train - 1, seed=SEED)
        for rows, expected in zip(split_rows(y == 1, SEED), theirs, strict=True):
            assert np.array_equal(rows, expected)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("n", [300, 1400])
def test_figures_are_the_same(package, n, penalty):
    evals, training = package("run_sae_evals"), package("utils_training")
    y = np.random.default_rng(1).permutation(np.arange(n) % 2 == 1)
    train, test = split_rows(y, SEED)
    X = latents(n, 60, y)
    order = by_difference(csr_array(X[train]), y[train])
    theirs = evals.get_sorted_indices(
        torch.from_numpy(X[train]), torch.from_numpy(y[train]), evals.mean_act_normalization
    )
    assert order.tolist() == theirs.tolist()
    for k in (1, 16):
        chosen = order[:k]
        ours = scores_of(fit(X[train][:, chosen], y[train], X[test][:, chosen], penalty, SEED), y[test])
        found = training.find_best_reg(
            X[train][:, chosen],
            y[train].astype(int),
            X[test][:, chosen],
            y[test].astype(int),
            penalty=penalty,
            seed=SEED,
        ).metrics
        assert ours.auc == pytest.approx(found.test_auc, abs=1e-12)
        assert ours.accuracy == found.test_acc
        assert ours.f1 == pytest.approx(found.test_f1, abs=1e-12)
        assert ours.auc > 0.55
