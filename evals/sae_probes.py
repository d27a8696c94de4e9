"""The benchmark sae-probes: probes on a few latents of each text's last token, beside a probe on the model's activations.

The protocol is that of Kantamneni et al., "Are Sparse Autoencoders Useful? A Case Study in Sparse Probing" (arXiv
2502.16681), in its normal setting, as the package sae-probes 0.4.2 runs it on its own data sets (`probe_sets`). Each text is
cut to its last 1,024 tokens, including `<bos>` if the tokenizer has one, and x is the activation at the last token. The k
latents that separate the classes best are selected, and a logistic regression with an L1 penalty is fitted to their
values f_j(x) (`tuned_probes`). `auc`, `accuracy` and `f1` are its figures on the test texts by k, and their means over data
sets. `llm` is the paper's baseline, a logistic regression with an L2 penalty on all of x.

Controls use the same texts and splits: `random` (a dictionary with an untrained decoder), `lm_neurons` (each token's largest
activations) and `shuffled` (the dictionary's latents with permuted labels). `reached_by` names the controls whose AUC at
the largest k up to 16 is at least the dictionary's. The interval of a data set's AUC is a bootstrap over its test texts. The
one of the mean draws texts within each data set.

Only the last token's activations and latents are kept in memory. Latents are stored sparse.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.storage.files import digest
from ..engine.stream import ActivationStream
from ..kernels.code import SparseCode
from .auc import Ranked
from .chosen_sets import sets_read
from .evaluation import Evaluation, TextActivations, joined, padded
from .intervals import described, difference, resamples
from .kept_sets import SetResult
from .pooling import as_csr
from .probe_sets import ProbeSet, load, probe_sets
from .probes import ailing
from .tuned_probes import Fitted, Latents, Penalty, Scores, by_difference, fit, scores_of, split_rows

CONTEXT = 1024
KS = (1, 2, 4, 8, 16)  # the package goes on to 512; probes on more latents take most of the time
MAIN = 16  # the k of `reached_by`
SHOWN = 16  # latents that a result names
FIGURES = Scores._fields
_TOKENS = 8192  # in a batch, padding included


def sae_probes(
    evaluation: Evaluation,
    sets: Sequence[str] | None = None,
    *,
    ks: tuple[int, ...] | None = None,
    penalty: Penalty = "l1",
) -> dict[str, Any]:
    """Measure the probes on k latents for each of `ks` (default: `KS`, none above F), on data sets of sae-probes.

    `sets`: as for `probe_sets.probe_sets`; default: the evaluation's, or quick. Raises UserError for a k above F, and for
    data that is missing or can't be read.
    """
    F = evaluation.sae.cfg.d_sae
    ks = tuple(sorted({*(ks or (k for k in KS if k <= F))}))
    if not 1 <= ks[0] <= ks[-1] <= F:
        raise UserError(f"ks: {ks[0] if ks[0] < 1 else ks[-1]} is not allowed; the dictionary has F = {F} latents")
    chosen = probe_sets(sets_read("sae_probes", evaluation.sets) if sets is None else sets)
    results: dict[str, SetResult] = {}
    for number, probe_set in enumerate(chosen, 1):
        settings = {"texts": probe_set.texts, "file": digest(probe_set.file), "ks": list(ks), "penalty": penalty}
        kept = None if evaluation.kept_sets is None else evaluation.kept_sets.read(probe_set.name, settings)
        if kept is None:
            kept = _measured(evaluation, probe_set, ks, penalty, f"{probe_set.name} ({number} of {len(chosen)})")
            if evaluation.kept_sets is not None:
                evaluation.kept_sets.write(probe_set.name, settings, kept)
        results[probe_set.name] = kept
    of_sets = {name: {k: v for k, v in kept.scores.items() if k != "warnings"} for name, kept in results.items()}
    figures = _mean([_figures_of(scores) for scores in of_sets.values()])
    return {
        **figures,
        "intervals": _intervals(list(results.values()), figures, ks),
        "reached_by": _reached(figures, str(_main(ks))),
        "sets": of_sets,
        "protocol": {
            "setting": "normal", "penalty": penalty, "k_values": list(ks), "main_k": _main(ks),
            "context_length": _context(evaluation), "data_sets": len(of_sets),
        },
        "warnings": [f"{name}: {text}" for name, kept in results.items() for text in kept.scores["warnings"]],
        "model": evaluation.stream.model.name,
        "hook": evaluation.stream.model.hook,
    }  # fmt: skip


def _measured(
    evaluation: Evaluation, probe_set: ProbeSet, ks: tuple[int, ...], penalty: Penalty, title: str
) -> SetResult:
    """Probe one data set."""
    purpose = f"sae_probes/{probe_set.name}"
    labelled = load(probe_set, evaluation.generator(f"{purpose}/texts"))
    labels = np.array(labelled.labels)
    y = labels == _second(labels)
    train, test = split_rows(y, evaluation.seed)
    x, latents, tokens = last_tokens(evaluation, labelled.texts, title)
    permuted = evaluation.generator(f"{purpose}/shuffled").permutation(y)
    warnings: list[str] = []
    fitted: dict[str, dict[int, Fitted]] = {}
    answers = {**dict.fromkeys(latents, y), "shuffled": permuted}
    order = np.zeros(0, np.int64)
    with progress_bar(f"probing {title}", total=1 + len(answers) * len(ks), unit="probes") as bar:
        fitted["llm"] = {0: fit(x[train], y[train], x[test], "l2", evaluation.seed)}
        bar.advance(1)
        for name, of_name in answers.items():
            codes = latents["sae" if name == "shuffled" else name]
            if (reason := ailing(codes)) is not None:
                if name != "shuffled":
                    warnings.append(f"{name}: {reason}")
                continue
            best = by_difference(codes[train], of_name[train])
            order = best if name == "sae" else order
            fitted[name] = {}
            for k in ks:
                rows = (codes[rows][:, best[:k]].toarray() for rows in (train, test))
                fitted[name][k] = fit(next(rows), of_name[train], next(rows), penalty, evaluation.seed)
                bar.advance(1)
    scores = {
        name: {k: scores_of(probe, answers.get(name, y)[test]) for k, probe in by_k.items()}
        for name, by_k in fitted.items()
    }
    draws = _draws(fitted, y[test], evaluation.generator(f"{purpose}/intervals"))
    named = {name: _by_figure(scores.get(name), ks) for name in answers}
    result = {
        **named.pop("sae"),
        "llm": scores["llm"][0]._asdict(),
        "controls": named,
        "train_rows": len(train),
        "test_rows": len(test),
        "tokens": tokens,
        "latents": order[:SHOWN].tolist(),
        "warnings": warnings,
    }
    result["reached_by"] = _reached(result, str(_main(ks)))
    kept = SetResult(result, draws)
    return kept._replace(scores=result | {"intervals": _intervals([kept], result, ks)})


@torch.no_grad()
def last_tokens(evaluation: Evaluation, texts: Sequence[str], title: str) -> tuple[np.ndarray, dict[str, Latents], int]:
    """Activations float32 [n, D] and latents [n, F] by autoencoder at the last token of each text, and the number of tokens.

    Texts run in batches of similar length. Only what is returned is kept.
    """
    stream = evaluation.stream
    ids = _token_ids(stream, texts, _context(evaluation))
    order = sorted(range(len(ids)), key=lambda text: len(ids[text]))
    activations: list[torch.Tensor] = []
    codes: dict[str, list[SparseCode]] = {}
    with progress_bar(f"activations of {title}", total=sum(map(len, ids)), unit="tokens") as bar:
        for batch in _batches(order, ids, stream):
            last = _at_last_token(stream, [ids[text] for text in batch])
            activations.append(last.x.cpu())
            for name, autoencoder in evaluation.autoencoders(last, mean=False).items():
                code = joined([last.code(autoencoder)])
                codes.setdefault(name, []).append(code)
            bar.advance(sum(len(ids[text]) for text in batch))
    back = np.argsort(order)
    latents = {name: as_csr(joined(parts))[back] for name, parts in codes.items()}
    return torch.cat(activations).numpy()[back], latents, sum(map(len, ids))


def _token_ids(stream: ActivationStream, texts: Sequence[str], context: int) -> list[list[int]]:
    """Token ids of each text's end, with `<bos>` in front if the tokenizer has one."""
    tokenizer = stream.model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    most = context - len(bos)
    if not all(ids):
        raise UserError("--set: a text without tokens is not allowed; remove it from the data set")
    return [bos + text_ids[-most:] for text_ids in ids]


def _batches(order: list[int], ids: list[list[int]], stream: ActivationStream) -> Iterator[list[int]]:
    """Numbers of texts, in the given order by length, in batches of at most `_TOKENS` tokens with padding."""
    batch: list[int] = []
    for text in order:
        if batch and (len(batch) == stream.config.rows_per_forward or (len(batch) + 1) * len(ids[text]) > _TOKENS):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _at_last_token(stream: ActivationStream, ids: list[list[int]]) -> TextActivations:
    """Activations at each text's last token, which counts even if training would leave it out."""
    (rows,) = padded(ids, stream)
    read, kept = stream.read(rows)
    last = torch.zeros_like(rows.tokens, dtype=torch.bool)
    last[torch.arange(len(ids)), rows.length - 1] = True
    kept = kept.cpu() | last
    x = next(iter(read.values()))
    return TextActivations.of(rows.tokens, kept, x[kept.to(x.device)].float()).only(last)


def _context(evaluation: Evaluation) -> int:
    """Tokens of a text that are read: 1,024, or fewer if the model or a dictionary that depends on positions can't."""
    sae, stream = evaluation.sae.cfg, evaluation.stream
    by_position = sae.mask.kind != "none" or bool(sae.parts)
    return min(CONTEXT, stream.model.context, stream.positions if by_position else CONTEXT)


def _second(labels: np.ndarray) -> str:
    """The class that counts as positive: the second one, by number if both are numbers, otherwise by name."""
    classes = np.unique(labels).tolist()
    try:
        return sorted(classes, key=float)[1]
    except ValueError:
        return classes[1]


def _main(ks: Sequence[int]) -> int:
    return max((k for k in ks if k <= MAIN), default=ks[0])


def _by_figure(by_k: Mapping[int, Scores] | None, ks: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """Figure -> k -> score; None without probes."""
    return {
        figure: {str(k): None if by_k is None else getattr(by_k[k], figure) for k in ks} for figure in FIGURES
    }  # fmt: skip


def _draws(
    fitted: Mapping[str, Mapping[int, Fitted]], y: np.ndarray, draw: np.random.Generator
) -> dict[str, dict[str, np.ndarray]]:
    """AUC of each probe over resamples of the test texts, the same for all probes: k -> name -> float32 [draws]."""
    ranked = {
        (name, k): Ranked(probe.probability, y)
        for name, by_k in fitted.items()
        for k, probe in by_k.items()
        if name != "shuffled"
    }
    parts: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in ranked}
    for counts in resamples(len(y), draw):
        for key, items in ranked.items():
            parts[key].append(items.scores(counts))
    by_k: dict[str, dict[str, np.ndarray]] = {}
    for (name, k), scores in parts.items():
        by_k.setdefault(str(k), {})[name] = np.concatenate(scores).astype(np.float32)
    return by_k


def _intervals(results: list[SetResult], figures: Mapping[str, Any], ks: Sequence[int]) -> dict[str, Any]:
    """Intervals of the AUC by k: of one data set, or of the mean over several, with texts drawn within each."""
    items = sum(result.scores["test_rows"] for result in results)
    found: dict[str, Any] = {}
    for k in map(str, ks):
        values = {"sae": figures["auc"][k], "llm": figures["llm"]["auc"]}
        values |= {name: figures["controls"][name]["auc"][k] for name in figures["controls"] if name != "shuffled"}
        values = {name: value for name, value in values.items() if value is not None}
        if "sae" not in values:
            continue
        by_name = {
            name: np.mean([result.draws["0" if name == "llm" else k][name] for result in results], axis=0, dtype=float)
            for name in values
        }
        interval = described(by_name, values, items)
        found[k] = interval | {"above_llm": difference(by_name, values, items, "llm")}
    return {"auc": found}


def _figures_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in (*FIGURES, "llm", "controls")}


def _reached(scores: Mapping[str, Any], k: str) -> list[str]:
    if (value := scores["auc"][k]) is None:
        return []
    controls = {name: of_control["auc"][k] for name, of_control in scores["controls"].items()}
    return [name for name, other in controls.items() if other is not None and other >= value]


def _mean(scores: list[Any]) -> Any:
    """Means of all figures over data sets, None if one is None."""
    if isinstance(scores[0], dict):
        return {key: _mean([score[key] for score in scores]) for key in scores[0]}
    return None if None in scores else float(sum(scores) / len(scores))
