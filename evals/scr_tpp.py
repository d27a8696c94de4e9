"""Targeted probe perturbation (TPP) and spurious correlation removal (SCR): probe accuracy after ablation of a few latents.

Both follow the description of SAEBench (https://github.com/adamkarvonen/SAEBench) and its paper (Karvonen et al., arXiv
2411.18895). x [R, D] is a document's mean activation, f [R, F] its mean latents, and (w, b) a logistic regression on x that
separates a class from others:

    effect_j = (mean of f_j over the class - mean of f_j over the others) * (w . W_dec_j)
               TPP: 0 if the class has a lower mean than the others; SCR: the absolute value
    x'       = x - sum over the ablated j of f_j W_dec_j                     the reconstruction error is kept
    TPP      = accuracy lost by the class whose n strongest latents are ablated - mean accuracy lost by the other classes
    SCR      = (A_ablated - A_base) / (A_clean - A_base)

x' is linear in x and f, so ablation in every token is the same as ablation in the mean. Latents with the largest effects are
ablated first, and those without effect never.

On the embedded language, TPP uses topics as classes. SCR trains a probe on documents of two topics, each only in its
preferred tone, so that topic and tone coincide. A_base is the accuracy of this probe on documents in which they are
independent, A_clean that of a probe trained on such documents. dir1 ablates the tone's latents and scores the topic, dir2
the other way round. scr_metric is the direction with the lower A_base: the attribute that the probe did not learn. If
A_clean - A_base is below `GAP`, there is nothing to remove, and SCR is None.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError
from ..engine.testbed.lexicon import TOPICS
from .evaluation import Autoencoder, Evaluation, TextActivations
from .intervals import Outcomes, interval
from .probes import balanced

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # numbers of latents to ablate
ROWS, SEEDS = 1024, 3
GAP = 0.05  # smaller differences of two accuracies on about sixty documents are noise
SCR_AT, TPP_AT = 20, 10  # number of ablated latents for the score


@torch.no_grad()
def tpp(evaluation: Evaluation, *, rows: int = ROWS, seeds: int = SEEDS, pool_padding: bool = False) -> dict[str, Any]:
    """Measure targeted probe perturbation by topic on `rows` labelled documents, split anew by each of `seeds` seeds.

    Returns `tpp` {n: {total_metric, intended_diff_only, unintended_diff_only}}, `spread` {n: standard deviation of the total
    over seeds}, `score` (the total at n = 10 or the largest n below), the probes' `clean_accuracy`, the same figures of
    `controls`, and `reached_by`, the controls that score as high. With `pool_padding`, the mean is over all positions, as in
    SAEBench: positions left out count as zero activations, with the latents that zeros give. Raises UserError for a text
    without labels, and too few rows or seeds.
    """
    collected = _labelled(evaluation, rows, seeds)
    topic, C = collected.row_label("topic").numpy(), len(TOPICS)
    x, autoencoders = _pooled(collected, None, pool_padding), _autoencoders(evaluation, collected, pool_padding)
    ns = _thresholds(evaluation)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in autoencoders}  # [n, 3] per seed
    clean: list[float] = []
    sizes: list[tuple[int, int]] = []  # rows for training and for testing each probe
    at, outcomes = _at(ns, TPP_AT), _Ablated(len(x), seeds * C, list(autoencoders))
    for seed in range(seeds):
        draw = evaluation.generator(f"tpp {seed}")
        sides = map(np.concatenate, zip(*_halves(topic, range(C), draw), strict=True))
        train, test = ([side[balanced(topic[side] == c, draw, groups=topic[side])] for c in range(C)] for side in sides)
        sizes += [(len(a), len(b)) for a, b in zip(train, test, strict=True)]
        W, b = _probes([(x[rows], topic[rows] == c) for c, rows in enumerate(train)])
        logits = x @ W.T + b

        def right(logits: np.ndarray, test: list[np.ndarray] = test) -> list[np.ndarray]:
            return [(logits[rows, c] > 0) == (topic[rows] == c) for c, rows in enumerate(test)]

        right_before = right(logits)
        before = np.array([answers.mean() for answers in right_before])
        clean.append(float(before.mean()))
        for name, (f, W_dec) in autoencoders.items():
            change, lost = _ablation(f, W_dec, W), np.empty((len(ns), C, C))
            for c, train_rows in enumerate(train):
                effects = _difference(f, train_rows, topic[train_rows] == c).clip(0) * (W_dec @ W[c])
                if name == "shuffled":
                    effects = draw.permutation(effects)
                order = _strongest(effects)
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
            scores[name].append(np.stack([intended - unintended, intended, unintended], 1))

    result = {name: _tpp_figures(ns, by_seed) for name, by_seed in scores.items()}
    settings = {
        "protocol": _protocol(collected, ns, sizes, {}),
        "clean_accuracy": float(np.mean(clean)),
        "classes": list(TOPICS),
        "seeds": seeds,
        "intervals": {"score": outcomes.interval(evaluation.generator("tpp intervals"))},
    }
    return settings | _beside(result, len(collected), pool_padding)


@torch.no_grad()
def scr(evaluation: Evaluation, *, rows: int = ROWS, seeds: int = SEEDS, pool_padding: bool = False) -> dict[str, Any]:
    """Measure spurious correlation removal on pairs of topics in `rows` labelled documents, split anew by each seed.

    Returns `scr_metric`, `scr_dir1`, `scr_dir2` {n: mean over pairs and seeds, or None}, `spread` {n: standard deviation of
    scr_metric over seeds}, `score` (scr_metric at n = 20 or the largest n below), `sets` {pair: accuracies, and
    scr_metric by n}, the same figures of `controls` without `sets`, and `reached_by`. `pool_padding` and errors: see `tpp`.
    """
    collected = _labelled(evaluation, rows, seeds)
    topic, tone = collected.row_label("topic").numpy(), collected.row_label("tone").numpy()
    x, autoencoders = _pooled(collected, None, pool_padding), _autoencoders(evaluation, collected, pool_padding)
    ns, pairs = _thresholds(evaluation), [(a, a + 1) for a in range(0, len(TOPICS), 2)]
    scores = {name: np.full((seeds, len(pairs), 3, len(ns)), np.nan) for name in autoencoders}  # dir1, dir2, metric
    accuracies = np.empty((seeds, len(pairs), 4))
    at, outcomes = _at(ns, SCR_AT), _Ablated(len(x), seeds * len(pairs), list(autoencoders))
    sizes: list[tuple[int, int]] = []
    for seed in range(seeds):
        for index, pair in enumerate(pairs):
            draw = evaluation.generator(f"scr {seed} {index}")
            groups = _halves(2 * topic + tone, (2 * t + manner for t in pair for manner in (0, 1)), draw)
            # the first topic of a pair prefers the first tone, the second topic the second
            biased = _evenly([groups[0][0], groups[3][0]])
            train, test = (_evenly([group[side] for group in groups]) for side in (0, 1))
            sizes.append((max(len(biased), len(train)), len(test)))
            labels = [topic == pair[1], tone == 1]
            W, b = _probes([(x[biased], labels[0][biased]), *((x[train], y[train]) for y in labels)])
            logits = x @ W.T + b

            def right(logits: np.ndarray, y: np.ndarray, test: np.ndarray = test) -> np.ndarray:
                return (logits[test] > 0) == y[test]

            clean = [float(right(logits[:, 1 + i], y).mean()) for i, y in enumerate(labels)]
            base = [float(right(logits[:, 0], y).mean()) for y in labels]
            learned_less = 0 if base[0] < base[1] else 1
            accuracies[seed, index] = [*clean, *base]
            for name, (f, W_dec) in autoencoders.items():
                change, pair_scores = _ablation(f, W_dec, W[:1]), scores[name][seed, index]
                for scored, ablated in ((0, 1), (1, 0)):
                    effects = np.abs(_difference(f, train, labels[ablated][train]) * (W_dec @ W[1 + ablated]))
                    if name == "shuffled":
                        effects = draw.permutation(effects)
                    order, gap = _strongest(effects), clean[scored] - base[scored]
                    if gap >= GAP:
                        changed = (logits[:, 0] - change(order[:n])[:, 0] for n in ns)
                        right_after = [right(ablated_logits, labels[scored]) for ablated_logits in changed]
                        after = np.array([answers.mean() for answers in right_after])
                        pair_scores[scored] = (after - base[scored]) / gap
                        if scored == learned_less:
                            gain = right_after[at] * 1.0 - right(logits[:, 0], labels[scored])
                            outcomes.add(name, seed * len(pairs) + index, test, gain / gap)
                pair_scores[2] = pair_scores[learned_less]

    topics = [tuple(list(TOPICS)[t] for t in pair) for pair in pairs]
    sets = _by_pair(ns, topics, accuracies, scores["sae"])
    result = {name: _scr_figures(ns, all_scores) for name, all_scores in scores.items()}
    protocol = _protocol(collected, ns, sizes, {"the embedded language": topics})
    intervals = {"score": outcomes.interval(evaluation.generator("scr intervals"))}
    return {"sets": sets, "seeds": seeds, "protocol": protocol, "intervals": intervals} | _beside(
        result, len(collected), pool_padding
    )


def _tpp_figures(ns: list[int], by_seed: list[np.ndarray]) -> dict[str, Any]:
    """Means and spread by n from scores [n, 3] of each seed."""
    mean = np.mean(by_seed, 0)
    names = ("total_metric", "intended_diff_only", "unintended_diff_only")
    by_n = {n: dict(zip(names, map(float, mean[index]), strict=True)) for index, n in enumerate(ns)}
    spread = np.std(by_seed, 0, ddof=1)[:, 0]
    score = by_n[ns[_at(ns, TPP_AT)]]["total_metric"]
    return {"tpp": by_n, "spread": dict(zip(ns, map(float, spread), strict=True)), "score": score}


def _by_pair(
    ns: list[int], topics: list[tuple[str, ...]], accuracies: np.ndarray, scores: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Mean accuracies, from [seeds, pairs, 4], and metric by n, from scores [seeds, pairs, 3, n], of each pair of topics."""
    names = ("clean_topic", "clean_tone", "base_topic", "base_tone")
    return {
        "/".join(pair): {
            **dict(zip(names, map(float, accuracies[:, index].mean(0)), strict=True)),
            "scr_metric": _by_n(ns, scores[:, index : index + 1, 2]),
        }
        for index, pair in enumerate(topics)
    }


class _Ablated:
    """Outcomes of documents at the score's number of latents, [documents, groups] by autoencoder. A group is one probe's
    test set of one seed; a document counts in every group that tests it."""

    def __init__(self, documents: int, groups: int, names: list[str]):
        self.counted = np.zeros((documents, groups))
        self.gained = {name: np.zeros((documents, groups)) for name in names}

    def add(self, name: str, group: int, rows: np.ndarray, gained: np.ndarray) -> None:
        self.counted[rows, group] = 1
        self.gained[name][rows, group] += gained

    def interval(self, draw: np.random.Generator) -> dict[str, Any] | None:
        return interval({name: Outcomes(gained, self.counted) for name, gained in self.gained.items()}, draw)


def _at(ns: list[int], n: int) -> int:
    """Index of the largest number of latents up to `n`, or of the smallest."""
    return max((index for index, other in enumerate(ns) if other <= n), default=0)


def _scr_figures(ns: list[int], scores: np.ndarray) -> dict[str, Any]:
    """Means and spread by n from scores [seeds, pairs, 3, n] of both directions and the metric."""
    metric, spread = _by_n(ns, scores[:, :, 2]), dict[int, float | None]()
    for i, n in enumerate(ns):
        means = [mean for seed_scores in scores if (mean := _mean(seed_scores[:, 2, i])) is not None]
        spread[n] = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return {
        "scr_metric": metric,
        "scr_dir1": _by_n(ns, scores[:, :, 0]),
        "scr_dir2": _by_n(ns, scores[:, :, 1]),
        "spread": spread,
        "score": metric[ns[_at(ns, SCR_AT)]],
    }


def _labelled(evaluation: Evaluation, rows: int, seeds: int) -> TextActivations:
    if seeds < 2:
        raise UserError(f"seeds: {seeds} is not allowed; the spread needs at least 2")
    return evaluation.labelled(rows)


def _pooled(collected: TextActivations, autoencoder: Autoencoder | None, padding: bool) -> np.ndarray:
    """Mean latents (or activations) of each row; with `padding` over all T positions, with x = 0 where not kept."""
    pooled = collected.pooled(autoencoder)
    if padding:
        kept = collected.kept.to(pooled.device)
        T = kept.shape[1]
        pooled = pooled * (kept.sum(1, keepdim=True) / T)
        if autoencoder is not None:
            pos = torch.arange(T, device=pooled.device)
            zeros = autoencoder.encode_sparse(collected.x.new_zeros(T, collected.x.shape[1]), pos).to_dense()
            pooled = pooled + (~kept).to(zeros.dtype) @ zeros / T
    return pooled.double().cpu().numpy()


def _autoencoders(
    evaluation: Evaluation, collected: TextActivations, padding: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean latents and W_dec by name. `shuffled` is the dictionary, whose effects the caller permutes over latents."""
    latents = {
        name: (_pooled(collected, autoencoder, padding), autoencoder.W_dec.detach().double().cpu().numpy())
        for name, autoencoder in evaluation.autoencoders(collected).items()
    }
    return latents | {"shuffled": latents["sae"]}


def _thresholds(evaluation: Evaluation) -> list[int]:
    f = evaluation.sae.cfg.d_sae
    return [n for n in THRESHOLDS if n <= f] or [f]


def _halves(labels: np.ndarray, kinds: Iterable[int], draw: np.random.Generator) -> list[list[np.ndarray]]:
    rows_by_kind = [draw.permutation(np.flatnonzero(labels == kind)) for kind in kinds]
    if min(map(len, rows_by_kind)) < 4:
        raise UserError(f"rows: {len(labels)} is not allowed; give more, every topic (in every tone) needs 4 documents")
    return [np.array_split(rows, 2) for rows in rows_by_kind]


def _evenly(groups: list[np.ndarray]) -> np.ndarray:
    """Equally many rows of each group, as many as the smallest has."""
    count = min(map(len, groups))
    return np.concatenate([group[:count] for group in groups])


def _probes(tasks: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """W [C, D] and b [C] of logistic regressions for C tasks (X, y)."""
    fitted = [LogisticRegression(max_iter=1000).fit(X, y) for X, y in tasks]
    return np.concatenate([p.coef_ for p in fitted]), np.concatenate([p.intercept_ for p in fitted])


def _difference(f: np.ndarray, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean of each latent over the class minus its mean over the others, [F]."""
    return f[rows[y]].mean(0) - f[rows[~y]].mean(0)


def _strongest(effects: np.ndarray) -> np.ndarray:
    """Latents with an effect above rounding error, largest first, negative ones last."""
    order = np.argsort(-effects, kind="stable")
    return order[np.abs(effects[order]) > 1e-12 * max(np.abs(effects).max(), 1e-300)]


def _ablation(f: np.ndarray, W_dec: np.ndarray, W: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from ablated latents to the decrease of the probes' logits [R, C]."""
    written = W_dec @ W.T
    return lambda chosen: f[:, chosen] @ written[chosen]


def _protocol(
    collected: TextActivations, ns: list[int], sizes: list[tuple[int, int]], pairs: dict[str, list[Any]]
) -> dict[str, Any]:
    """Settings by SAEBench's names. Probes here have no epochs, learning rate or L1 penalty."""
    train, test = (max(side) for side in zip(*sizes, strict=True))
    return {
        "dataset_names": ["the embedded language"],
        "train_set_size": train,
        "test_set_size": test,
        "context_length": collected.tokens.shape[1],
        "n_values": ns,
        "column1_vals_lookup": pairs,
    }


def _beside(result: dict[str, dict[str, Any]], rows: int, pool_padding: bool) -> dict[str, Any]:
    """The dictionary's figures, those of the controls, and the controls that score as high."""
    scores, controls = result["sae"], {name: control for name, control in result.items() if name != "sae"}
    score, known = scores["score"], {name: d["score"] for name, d in controls.items() if d["score"] is not None}
    reached = [] if score is None else [name for name, control in known.items() if control >= score]
    return {**scores, "controls": controls, "reached_by": reached, "rows": rows, "pool_padding": pool_padding}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _by_n(ns: list[int], scores: np.ndarray) -> dict[int, float | None]:
    """Means of scores [seeds, pairs, n] by n."""
    return {n: _mean(scores[..., i]) for i, n in enumerate(ns)}
