"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR): probe accuracy after ablation of a few latents.

Both follow the description of SAEBench (https://github.com/adamkarvonen/SAEBench) and its paper (Karvonen et al., arXiv
2411.18895). x [R, D] is a text's mean activation, f [R, F] its mean latents, and (w, b) a linear probe on x that separates
a class from others:

    effect_j = (mean of f_j over the class - mean of f_j over the others) * (w . W_dec_j)
               TPP: 0 if the class has a lower mean than the others; SCR: the absolute value
    x'       = x - sum over the ablated j of f_j W_dec_j                     the reconstruction error is kept
    TPP      = accuracy lost by the class whose n strongest latents are ablated - mean accuracy lost by the other classes
    SCR      = (A_ablated - A_base) / (A_clean - A_base)

x' is linear in x and f, so ablation in every token is the same as ablation in the mean. Latents with the largest effects are
ablated first. `ablation_recipes.py` has the probes, the latents that are ablated and the smallest gap A_clean - A_base for
which SCR is given, by the evaluation's `protocol`.

The classes are those of labelled sets (`class_sets.py`), or of the embedded language, whose TPP uses topics as classes. SCR
trains a probe on texts of two classes, each with one value only of a binary attribute (the tone of the embedded language),
so that class and attribute coincide. A_base is the accuracy of this probe on texts in which they are independent, A_clean
that of a probe trained on such texts. dir1 ablates the attribute's latents and scores the class, dir2 the other way round.
scr_metric is the direction with the lower A_base: what the probe did not learn.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.errors import UserError
from .ablation_recipes import Recipe, Task, recipe
from .class_sets import LANGUAGE, ClassSet, Latents, class_sets
from .evaluation import Evaluation
from .intervals import Outcomes, interval, joined
from .probes import Matrix, balanced

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # numbers of latents to ablate
ROWS, SEEDS = 1024, 3
SCR_AT, TPP_AT = 20, 10  # number of ablated latents for the score
ACCURACIES = ("clean_class", "clean_attribute", "base_class", "base_attribute")


@dataclass
class _Scores:
    """What one set gives. `scores` [seeds, 1, n, 3] (TPP) or [seeds, pairs, n, 3] (SCR) by autoencoder; `accuracies`
    [seeds, 1] (TPP) or [seeds, pairs, 4]; `sizes`: rows for training and testing each probe; `sets`: what a result says
    about the set, or about each of its pairs."""

    scores: dict[str, np.ndarray]
    accuracies: np.ndarray
    sizes: list[tuple[int, int]]
    outcomes: dict[str, Outcomes]
    sets: dict[str, dict[str, Any]]


@torch.no_grad()
def tpp(evaluation: Evaluation, *, rows: int = ROWS, seeds: int = SEEDS) -> dict[str, Any]:
    """Measure targeted probe perturbation on labelled sets, or on `rows` documents of the embedded language.

    Each set is split anew by each of `seeds` seeds. Returns `tpp` {n: {total_metric, intended_diff_only,
    unintended_diff_only}}, means over sets and seeds, `spread` {n: standard deviation of the total over seeds}, `score` (the
    total at n = 10 or the largest n below), the probes' `clean_accuracy`, the same by set in `sets`, the figures of
    `controls`, and `reached_by`, the controls that score as high. Raises UserError for a text without labels, and too few
    texts or seeds.
    """
    result = _measured(evaluation, rows, seeds, "tpp", _perturbed, _tpp_figures)
    return result | {"clean_accuracy": float(np.mean([texts["clean_accuracy"] for texts in result["sets"].values()]))}


def _perturbed(evaluation: Evaluation, texts: ClassSet, chosen: Recipe, ns: list[int], seeds: int) -> _Scores:
    """TPP of one set."""
    codes, C, x = texts.codes, len(texts.classes), texts.x
    latents = texts.latents | {"shuffled": texts.latents["sae"]}
    scores = {name: np.empty((seeds, 1, len(ns), 3)) for name in latents}
    clean = np.empty((seeds, 1))
    sizes: list[tuple[int, int]] = []
    at, outcomes = _at(ns, TPP_AT), _Ablated(len(x), seeds * C, list(latents))
    for seed in range(seeds):
        draw = evaluation.generator(f"tpp {seed}")
        sides = map(np.concatenate, zip(*_halves(codes, range(C), draw, texts.train), strict=True))
        train, test = ([side[balanced(codes[side] == c, draw, groups=codes[side])] for c in range(C)] for side in sides)
        sizes += [(len(a), len(b)) for a, b in zip(train, test, strict=True)]
        tasks = [_task(x, codes == c, a, b) for c, (a, b) in enumerate(zip(train, test, strict=True))]
        W, b = chosen.fit(tasks, evaluation.generator(f"tpp {seed} probes"))
        logits = x @ W.T + b

        def right(logits: np.ndarray, test: list[np.ndarray] = test) -> list[np.ndarray]:
            return [(logits[rows, c] > 0) == (codes[rows] == c) for c, rows in enumerate(test)]

        right_before = right(logits)
        before = np.array([answers.mean() for answers in right_before])
        clean[seed] = before.mean()
        for name, coded in latents.items():
            change, lost = _ablation(coded, W), np.empty((len(ns), C, C))
            for c, train_rows in enumerate(train):
                effects = _difference(coded.f, train_rows, codes[train_rows] == c).clip(0) * (coded.W_dec @ W[c])
                if name == "shuffled":
                    effects = draw.permutation(effects)
                order = chosen.order(effects)
                for index, n in enumerate(ns):
                    right_after = right(logits - change(order[:n]))
                    lost[index, c] = before - np.array([answers.mean() for answers in right_after])
                    if index == at:
                        for other, answers in enumerate(right_after):
                            gain = right_before[other] * 1.0 - answers
                            share = 1 if other == c else -1 / (C - 1)
                            outcomes.add(name, seed * C + other, test[other], share * gain)
            intended = np.einsum("nii->n", lost) / C
            unintended = (lost.sum((1, 2)) - intended * C) / (C * (C - 1))
            scores[name][seed, 0] = np.stack([intended - unintended, intended, unintended], 1)
    about = {"classes": texts.classes, "rows": len(x), "clean_accuracy": float(clean.mean())}
    of_set = {texts.name: about | {"tpp": _tpp_figures(ns, scores["sae"])["tpp"]}}
    return _Scores(scores, clean, sizes, outcomes.by_name(), of_set)


@torch.no_grad()
def scr(evaluation: Evaluation, *, rows: int = ROWS, seeds: int = SEEDS) -> dict[str, Any]:
    """Measure spurious correlation removal on pairs of classes of sets with an attribute, split anew by each seed.

    Returns `scr_metric`, `scr_dir1`, `scr_dir2` {n: mean over pairs and seeds, or None}, `spread` {n: standard deviation of
    scr_metric over seeds}, `score` (scr_metric at n = 20 or the largest n below), `sets` {pair: accuracies and the three
    figures by n}, the same figures of `controls` without `sets`, and `reached_by`. `rows` and errors: see `tpp`.
    """
    return _measured(evaluation, rows, seeds, "scr", _removed, _scr_figures)


def _removed(evaluation: Evaluation, texts: ClassSet, chosen: Recipe, ns: list[int], seeds: int) -> _Scores:
    """SCR of the pairs of one set."""
    assert texts.attribute is not None
    latents = texts.latents | {"shuffled": texts.latents["sae"]}
    scores = {name: np.full((seeds, len(texts.pairs), len(ns), 3), np.nan) for name in latents}  # metric, dir1, dir2
    accuracies = np.empty((seeds, len(texts.pairs), 4))
    outcomes = _Ablated(len(texts.x), seeds * len(texts.pairs), list(latents))
    sizes: list[tuple[int, int]] = []
    for seed in range(seeds):
        for index, pair in enumerate(texts.pairs):
            draw = evaluation.generator(f"scr {seed} {index}")
            cells = [2 * c + value for c in pair for value in (0, 1)]
            groups = _halves(2 * texts.codes + texts.attribute, cells, draw, texts.train)
            sides = [_biased_and_even([group[side] for group in groups], chosen.even_sizes) for side in (0, 1)]
            (biased, train), (biased_test, test) = sides
            sizes.append((max(len(biased), len(train)), len(test)))
            labels = [texts.codes == pair[1], texts.attribute]
            tasks = [_task(texts.x, labels[0], biased, biased_test)]
            tasks += [_task(texts.x, y, train, test) for y in labels]
            W, b = chosen.fit(tasks, evaluation.generator(f"scr {seed} {index} probes"))
            logits = texts.x @ W.T + b
            clean = [float(_right(logits[:, 1 + i], y, test).mean()) for i, y in enumerate(labels)]
            base = [float(_right(logits[:, 0], y, test).mean()) for y in labels]
            accuracies[seed, index] = [*clean, *base]
            task = _Removal(chosen, ns, labels, train, test, W, logits[:, 0], clean, base)
            for name, coded in latents.items():
                scores[name][seed, index], gain = task.scores(coded, draw if name == "shuffled" else None)
                if gain is not None:
                    outcomes.add(name, seed * len(texts.pairs) + index, test, gain)
    of_pairs: dict[str, dict[str, Any]] = {}
    for index, pair in enumerate(texts.pairs):
        name = "/".join(texts.classes[c] for c in pair)
        of_pairs[name if texts.name == LANGUAGE else f"{texts.name}: {name}"] = {
            "of": texts.name,
            "pair": [texts.classes[c] for c in pair],
            **dict(zip(ACCURACIES, map(float, accuracies[:, index].mean(0)), strict=True)),
            **_metrics(ns, scores["sae"][:, index : index + 1]),
        }
    return _Scores(scores, accuracies, sizes, outcomes.by_name(), of_pairs)


@dataclass
class _Removal:
    """One pair of classes in one split: training and test rows, the probes' W [3, D] (biased, class, attribute), the biased
    probe's `logits` [R], and the accuracies of class and attribute."""

    chosen: Recipe
    ns: list[int]
    labels: list[np.ndarray]
    train: np.ndarray
    test: np.ndarray
    W: np.ndarray
    logits: np.ndarray
    clean: list[float]
    base: list[float]

    def scores(self, coded: Latents, draw: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray | None]:
        """metric, dir1 and dir2 by n, [n, 3], and what each test text adds to the score's metric, None without one. With
        `draw`, effects are permuted."""
        gained: np.ndarray | None = None
        tie = self.base[0] == self.base[1] and not self.chosen.scores_ties
        scores, change = np.full((len(self.ns), 3), np.nan), _ablation(coded, self.W[:1])
        at, learned_less = _at(self.ns, SCR_AT), 0 if self.base[0] < self.base[1] else 1
        for scored, ablated in ((0, 1), (1, 0)):
            difference = _difference(coded.f, self.train, self.labels[ablated][self.train])
            effects = np.abs(difference * (coded.W_dec @ self.W[1 + ablated]))
            if draw is not None:
                effects = draw.permutation(effects)
            order, gap = self.chosen.order(effects), self.clean[scored] - self.base[scored]
            if gap < self.chosen.gap:
                scores[:, 1 + scored] = self.chosen.no_gap
                gain = np.zeros(len(self.test))
            else:
                right = [_right(self.logits - change(order[:n])[:, 0], self.labels[scored], self.test) for n in self.ns]
                after = np.array([answers.mean() for answers in right])
                scores[:, 1 + scored] = (after - self.base[scored]) / gap
                gain = (right[at] * 1.0 - _right(self.logits, self.labels[scored], self.test)) / gap
            if scored == learned_less and not tie and not np.isnan(scores[at, 1 + scored]):
                gained = gain
        if not tie:
            scores[:, 0] = scores[:, 1 + learned_less]
        return scores, gained


def _measured(
    evaluation: Evaluation, rows: int, seeds: int, name: str,
    of_set: Callable[[Evaluation, ClassSet, Recipe, list[int], int], _Scores],
    figures: Callable[[list[int], np.ndarray], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The result of `tpp` or `scr`: figures over all sets, by set, of the controls, and the settings."""
    chosen, ns = _recipe(evaluation, seeds), _thresholds(evaluation)
    measured, protocol = list[_Scores](), _Protocol(chosen, ns)
    for texts in class_sets(evaluation, rows, paired=name == "scr", padding=chosen.padding):
        measured.append(of_set(evaluation, texts, chosen, ns, seeds))
        protocol.add(texts, measured[-1].sizes)
    scores = _over(measured)
    return {
        "sets": scores.sets,
        "protocol": protocol.settings(),
        "protocol_name": chosen.name,
        "seeds": seeds,
        "intervals": {"score": interval(scores.outcomes, evaluation.generator(f"{name} intervals"))},
    } | _beside({autoencoder: figures(ns, of_all) for autoencoder, of_all in scores.scores.items()}, protocol.rows)


def _over(measured: list[_Scores]) -> _Scores:
    """All sets beside each other, each set or pair with equal weight."""
    if len(measured) == 1:
        return measured[0]
    names = measured[0].scores
    return _Scores(
        {name: np.concatenate([scores.scores[name] for scores in measured], 1) for name in names},
        np.concatenate([scores.accuracies for scores in measured], 1),
        [size for scores in measured for size in scores.sizes],
        {name: joined(scores.outcomes[name] for scores in measured) for name in measured[0].outcomes},
        {name: of_set for scores in measured for name, of_set in scores.sets.items()},
    )


def _tpp_figures(ns: list[int], scores: np.ndarray) -> dict[str, Any]:
    """Means and spread by n from scores [seeds, sets, n, 3]."""
    by_seed = scores.mean(1)
    mean = by_seed.mean(0)
    names = ("total_metric", "intended_diff_only", "unintended_diff_only")
    by_n = {n: dict(zip(names, map(float, mean[index]), strict=True)) for index, n in enumerate(ns)}
    spread = np.std(by_seed, 0, ddof=1)[:, 0]
    score = by_n[ns[_at(ns, TPP_AT)]]["total_metric"]
    return {"tpp": by_n, "spread": dict(zip(ns, map(float, spread), strict=True)), "score": score}


class _Ablated:
    """Outcomes of texts at the score's number of latents, [texts, groups] by autoencoder. A group is one probe's test set of
    one seed; a text counts in every group that tests it."""

    def __init__(self, texts: int, groups: int, names: list[str]):
        self.counted = np.zeros((texts, groups))
        self.gained = {name: np.zeros((texts, groups)) for name in names}

    def add(self, name: str, group: int, rows: np.ndarray, gained: np.ndarray) -> None:
        self.counted[rows, group] = 1
        self.gained[name][rows, group] += gained

    def by_name(self) -> dict[str, Outcomes]:
        return {name: Outcomes(gained, self.counted) for name, gained in self.gained.items()}


def _at(ns: list[int], n: int) -> int:
    """Index of the largest number of latents up to `n`, or of the smallest."""
    return max((index for index, other in enumerate(ns) if other <= n), default=0)


def _metrics(ns: list[int], scores: np.ndarray) -> dict[str, Any]:
    """Means by n from scores [seeds, pairs, n, 3] of the metric and both directions."""
    names = ("scr_metric", "scr_dir1", "scr_dir2")
    return {name: {n: _mean(scores[:, :, i, kind]) for i, n in enumerate(ns)} for kind, name in enumerate(names)}


def _scr_figures(ns: list[int], scores: np.ndarray) -> dict[str, Any]:
    """Means and spread by n from scores [seeds, pairs, n, 3]."""
    metrics, spread = _metrics(ns, scores), dict[int, float | None]()
    for i, n in enumerate(ns):
        means = [mean for seed_scores in scores if (mean := _mean(seed_scores[:, i, 0])) is not None]
        spread[n] = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {**metrics, "spread": spread, "score": metrics["scr_metric"][ns[_at(ns, SCR_AT)]]}


def _recipe(evaluation: Evaluation, seeds: int) -> Recipe:
    if seeds < 2:
        raise UserError(f"seeds: {seeds} is not allowed; the spread needs at least 2")
    return recipe(evaluation.protocol)


def _thresholds(evaluation: Evaluation) -> list[int]:
    f = evaluation.sae.cfg.d_sae
    return [n for n in THRESHOLDS if n <= f] or [f]


def _halves(
    labels: np.ndarray, kinds: Iterable[int], draw: np.random.Generator, train: float = 0.5
) -> list[list[np.ndarray]]:
    """Rows of each kind for training and for testing."""
    rows_by_kind = [draw.permutation(np.flatnonzero(labels == kind)) for kind in kinds]
    if min(map(len, rows_by_kind)) < 4:
        raise UserError(
            f"rows: {len(labels)} is not allowed; give more, every class (with every attribute) needs 4 texts"
        )
    return [np.split(rows, [math.ceil(train * len(rows))]) for rows in rows_by_kind]


def _biased_and_even(groups: list[np.ndarray], even_sizes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which class and attribute coincide (the first and the last group), and equally many rows of all four groups.
    With `even_sizes`, both are of one size."""
    biased, fewest = [groups[0], groups[3]], min(map(len, groups))
    count = min(map(len, biased))
    if even_sizes:
        fewest = min(fewest, count // 2)
        count = 2 * fewest
    return np.concatenate([g[:count] for g in biased]), np.concatenate([g[:fewest] for g in groups])


def _task(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Task:
    return Task(x[train], y[train], x[test], y[test])


def _right(logits: np.ndarray, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return (logits[rows] > 0) == y[rows]


def _difference(f: Matrix, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean of each latent over the class minus its mean over the others, [F]."""
    weight = np.zeros(f.shape[0])
    weight[rows[y]], weight[rows[~y]] = 1 / y.sum(), -1 / (~y).sum()
    return f.T @ weight


def _ablation(coded: Latents, W: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from ablated latents to the decrease of the probes' logits [R, C]."""
    written = coded.W_dec @ W.T
    return lambda chosen: coded.ablated(chosen) @ written[chosen]


class _Protocol:
    """Settings by SAEBench's names, from the recipe and the sets measured."""

    def __init__(self, chosen: Recipe, ns: list[int]):
        self.given, self.rows = chosen.settings | {"n_values": ns}, 0
        self.names, self.sizes, self.context = list[str](), list[tuple[int, int]](), 0
        self.pairs: dict[str, list[tuple[str, ...]]] = {}

    def add(self, texts: ClassSet, sizes: list[tuple[int, int]]) -> None:
        if texts.name not in self.names:
            self.names.append(texts.name)
        self.sizes += sizes
        self.context, self.rows = max(self.context, texts.context), self.rows + len(texts.x)
        if texts.pairs:
            pairs = [tuple(texts.classes[c] for c in pair) for pair in texts.pairs]
            self.pairs[texts.name] = [*self.pairs.get(texts.name, []), *pairs]

    def settings(self) -> dict[str, Any]:
        train, test = (max(side) for side in zip(*self.sizes, strict=True))
        return self.given | {
            "dataset_names": self.names,
            "train_set_size": train,
            "test_set_size": test,
            "context_length": self.context,
            "column1_vals_lookup": self.pairs,
        }


def _beside(result: dict[str, dict[str, Any]], rows: int) -> dict[str, Any]:
    """The dictionary's figures, those of the controls, and the controls that score as high."""
    scores, controls = result["sae"], {name: control for name, control in result.items() if name != "sae"}
    score, known = scores["score"], {name: d["score"] for name, d in controls.items() if d["score"] is not None}
    reached = [] if score is None else [name for name, control in known.items() if control >= score]
    return {**scores, "controls": controls, "reached_by": reached, "rows": rows}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
