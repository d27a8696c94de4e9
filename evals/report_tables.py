"""Tables of a report: the main scores of every eval, and its section, as Markdown."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..engine.stream.norm_filter import describe
from ..reporting.markdown import number, plain, table
from .evaluation import SAEBENCH
from .report_words import SCORES, label

CONTROLS = ("random", "lm_neurons", "mean", "shuffled")  # in the order of the columns
ON_REQUEST = ("soft_frozen", "frozen_encoder")  # controls with a column after that of random, if there are any
PICTURES = "pictures"  # placeholder block for a section's figures

ACCURACIES = ("clean_class", "clean_attribute", "base_class", "base_attribute")  # of SCR's probes


def main_scores(name: str, result: dict[str, Any]) -> list[str]:
    """Paths of an eval's main scores; all numbers at the top level for an eval not listed here."""
    figures = [key for key, value in result.items() if isinstance(value, float) and key != "seconds"]
    return SCORES[name].split() if name in SCORES else figures


def section(name: str, result: dict[str, Any]) -> list[str]:
    """Tables of a result as blocks of Markdown, with `PICTURES` in the place of its figures."""
    if name in SECTIONS:
        return SECTIONS[name](result)
    return [_beside(result, {path: label(path) for path in main_scores(name, result)})]


def lookup(scores: Any, path: str) -> Any:
    """The figure at a path such as "fidelity.snr.worst"; None if missing."""
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores


Figures = str | Mapping[str, str]  # paths separated by spaces, or headings by path


def _headings(figures: Figures) -> Mapping[str, str]:
    return {path: label(path) for path in figures.split()} if isinstance(figures, str) else figures


def with_requested(controls: Iterable[str]) -> list[str]:
    """`CONTROLS`, and those of `controls` that are not among them, in the order of the columns."""
    names = list(controls)
    requested = [name for name in ON_REQUEST if name in names]
    return list(dict.fromkeys([CONTROLS[0], *requested, *CONTROLS[1:], *names]))


def _autoencoders(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    controls = result.get("controls", {})
    return {"dictionary": result} | {name: controls[name] for name in with_requested(controls) if name in controls}


def _beside(result: dict[str, Any], figures: Figures) -> str:
    """Table with a line per figure and a column per dictionary or control."""
    autoencoders = _autoencoders(result)
    lines = [
        (plain(heading), *(number(lookup(scores, path)) for scores in autoencoders.values()))
        for path, heading in _headings(figures).items()
    ]
    return table(("", *map(plain, autoencoders)), lines)


def _items(names: str, items: Mapping[Any, Any], figures: Figures) -> str:
    """Table with a line per item: its name, under the headings `names`, and its figures."""
    headings, words = _headings(figures), names.split(", ") if names else []
    lines = [
        (*map(plain, key if isinstance(key, tuple) else (key,)), *(_cell(lookup(item, path)) for path in headings))
        for key, item in items.items()
    ]
    return table((*words, *map(plain, headings.values())), lines, range(len(words)))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return plain(value) if isinstance(value, str) else number(value)


def _by_n(result: dict[str, Any], metric: str) -> str:
    """Table of a figure ± its spread over seeds, by the number of ablated latents."""
    autoencoders = _autoencoders(result)
    lines = [
        (n, *(f"{number(lookup(s, metric.format(n)))} ± {number(s['spread'][n])}" for s in autoencoders.values()))
        for n in result["spread"]
    ]
    return table(("n", *map(plain, autoencoders)), lines, ())


def _core(result: dict[str, Any]) -> list[str]:
    names = {"clean": "none (clean model)", "sae": "dictionary"}
    losses = {names.get(name, name): {"ce": ce, "kl": result["kl"].get(name)} for name, ce in result["ce"].items()}
    scores = (
        "explained_variance saebench.explained_variance saebench.explained_variance_legacy ce_recovered "
        "ce_recovered_over_mean kl_recovered l0 dead_fraction mse cosine l2_ratio relative_reconstruction_bias l1"
    )
    return [
        _items("", {(): result}, "rows tokens ce_tokens"),
        plain(describe(result["massive"]) or ""),
        _beside(result, scores),
        PICTURES,
        "### Loss with the activation replaced",
        _items("replacement", losses, "ce kl"),
    ]


def _sparse_probing(result: dict[str, Any]) -> list[str]:
    ks = sorted(int(k) for key in result if (k := key.removeprefix("top_")).isdecimal())
    tops = " ".join(f"top_{k}" for k in ks)
    sets = result["sets"] if len(result["sets"]) == 1 else {"mean over sets": result, **result["sets"]}
    accuracies = {
        (name, autoencoder): accuracy
        for name, scores in sets.items()
        for autoencoder, accuracy in (_autoencoders(scores) | {"LM activations": scores["llm"]}).items()
    }
    classes = {(name, c): counts for name, scores in result["sets"].items() for c, counts in scores["classes"].items()}
    return [
        _items("set, probed", accuracies, f"{tops} test_accuracy top_1_error reached_by"),
        PICTURES,
        "### By class",
        _items("set, class", classes, "top_1 train_rows test_rows"),
    ]


def _positions(result: dict[str, Any]) -> list[str]:
    figures = (
        "specialization mutual_information nats_per_firing variance_explained positional_share spearman_share alive"
    )
    later = " ".join(f"after_first_8.{path}" for path in figures.split())
    blocks = ["### Specialization", _beside(result, figures)]
    blocks += ["### Specialization from position 8 on", _beside(result, later)]
    if (agreement := result.get("agreement")) is not None:
        blocks += ["### Agreement with the reference", *_agreement(agreement)]
    if (sliced := result.get("slicing")) is not None:
        blocks += [
            "### Slicing: specialization without training",
            "The dictionary with each latent masked to one range of positions, to random positions, and unmasked. "
            "Specialization that costs more explained variance than slicing has no value.",
            _items("slices", sliced, "specialization explained_variance l0"),
        ]
    if (fidelity := result.get("fidelity")) is not None:
        blocks += ["### Fidelity: quality late in a row and early", *_fidelity(fidelity)]
    if (order := result.get("order_probing")) is not None:
        blocks.append("### Order probing: texts with the same words")
        blocks += [f"Skipped: {plain(order['skipped'])}"] if "skipped" in order else _order(order)
    return blocks


def _agreement(result: dict[str, Any]) -> list[str]:
    seeds = result["same_recipe"]
    lines = {"dictionary": result} | ({} if seeds is None else {"reference, another seed": seeds})
    lines |= {"shuffled": result["shuffled"]} | result["controls"]
    headings = {"value": "agreement", "per_latent": "per latent", "matched": "mass matched (r above 0.5)"}
    return [
        "Correlation of latents with their partners in the reference on the same text, weighted by mass. Another seed of "
        "the reference's recipe shows what can be expected, shuffled what unrelated latents reach.",
        _items("compared with the reference", lines, headings),
    ]


def _fidelity(result: dict[str, Any]) -> list[str]:
    figures = "snr.mean snr.worst ce_recovered.mean ce_recovered.worst"
    shifts = {
        f"shifts.{shift}.{key}": f"{name}, text {shift} positions later"
        for shift in result["shifts"]
        for key, name in (("stay", "share of latents that stay"), ("jaccard", "Jaccard"))
    }
    columns = {
        f"{name}, {autoencoder}": scores[key]["by_bin"]
        for key, name in (("snr", "SNR"), ("ce_recovered", "CE"))
        for autoencoder, scores in _autoencoders(result).items()
    }
    lines = [
        (f"{first}–{last}", *(number(values[i]) for values in columns.values()))
        for i, (first, last) in enumerate(result["bins"])
    ]
    return [
        _beside(result, {**_headings(figures), **shifts}),
        "By position; SNR is the reconstruction's in dB, CE is CE recovered:",
        table(("positions", *map(plain, columns)), lines),
    ]


def _order(result: dict[str, Any]) -> list[str]:
    k, parts = f"{result['k']} latents", ("top_1", "lm", "normalised")
    lines = {
        (task, label(reading)): scores | {k: scores[reading]} | {part: scores[part][reading] for part in parts}
        for task, scores in result["tasks"].items()
        for reading in ("mean_pooled", "last_token")
    }
    headings = {**_headings("bow"), "top_1": "1 latent", k: k, **_headings("lm normalised test")}
    return [
        _items("", {(): result}, "k bow"),
        "Mean accuracy over tasks:",
        _beside(result, "mean_pooled last_token"),
        PICTURES,
        _items("task, read", lines, headings),
    ]


def _ground_truth(result: dict[str, Any]) -> list[str]:
    shares = {f"{level['f1']:.2f}": number(level["share"]) for level in result["detected_at"]}
    by_share = sorted(result["variables"].items(), key=lambda item: -(item[1]["recovered"] or 0))
    variables = {(name, variable["latent"]): variable for name, variable in by_share}
    return [
        _beside(result, "recovered detected mean_f1 mean_top_5"),
        PICTURES,
        "### Share of a variable's effect that k latents reconstruct, mean over variables",
        _beside(result, {f"recovered_by.{k}": f"k = {k}" for k in result["recovered_by"]}),
        "### Share of variables with at least this F1",
        table(list(shares), [list(shares.values())], ()),
        "### By variable",
        _items("variable, latent", variables, "recovered f1 precision recall top_5 tokens"),
    ]


def _unlearning(result: dict[str, Any]) -> list[str]:
    setting = "retain_threshold latents taken multiplier forget_accuracy retain_accuracy"
    best = " ".join(f"setting.{path}" for path in setting.split())
    task = "questions.forget questions.retain answer_orders activation_norm loss_increase"
    return [
        "All questions are ones that the unmodified model answers right.",
        _items("", {(): result}, task),
        "### Best settings",
        _items("dictionary or control", _autoencoders(result), f"score retained {best} reason"),
        PICTURES,
        "### All settings of the dictionary",
        _items("setting", dict(enumerate(result["settings"], 1)), f"{setting} counts"),
    ]


def _scr(result: dict[str, Any]) -> list[str]:
    metrics = {f"scr_metric.{n}": f"n = {n}" for n in result["scr_metric"]}
    return [
        f"Protocol {result['protocol_name']}. Mean over pairs and {result['seeds']} seeds ± standard deviation over seeds. "
        "The score is at the largest n up to 20.",
        _by_n(result, "scr_metric.{}"),
        PICTURES,
        "### By pair",
        "Accuracies on texts in which class and attribute are independent, and the metric. Clean probes are trained on such "
        "texts, base probes on texts in which class and attribute coincide.",
        _items("pair", result["sets"], {**_headings(" ".join(ACCURACIES)), **metrics}),
    ]


def _tpp(result: dict[str, Any]) -> list[str]:
    totals = {f"tpp.{n}.total_metric": f"n = {n}" for n in result["tpp"]}
    return [
        f"Protocol {result['protocol_name']}. The probes' accuracy before ablation is {number(result['clean_accuracy'])}. "
        f"Mean over {result['seeds']} seeds ± standard deviation over seeds. The score is at the largest n up to 10.",
        _by_n(result, "tpp.{}.total_metric"),
        PICTURES,
        "### Parts of the dictionary's score",
        _items("n", result["tpp"], "total_metric intended_diff_only unintended_diff_only"),
        "### By set",
        _items("set", result["sets"], {"classes": "classes", "rows": "texts", "clean_accuracy": "accuracy", **totals}),
    ]


def _clusters(result: dict[str, Any]) -> list[str]:
    measures = _headings("within between stability.adjusted_rand stability.spread")
    counts = {"count": "clusters", "latents": "latents clustered", "frequent": "latents that fire often enough"}
    blocks = [_beside(result, {**counts, **measures})]
    if not result["clusters"]:
        return [*blocks, "Too few latents fire often enough for clustering."]
    clusters = {
        i: {"latents": cluster["size"], "bin": 1 + profile.index(max(profile)), "share there": max(profile)}
        for i, cluster in enumerate(result["clusters"], 1)
        for profile in (cluster["profile"],)
    }
    headings = {"latents": "latents", "bin": f"most active in bin (of {result['bins']})", "share there": "share there"}
    silhouettes = {name: scores["silhouette"] for name, scores in _autoencoders(result).items()}
    return [
        *blocks,
        PICTURES,
        "### Clusters of the dictionary",
        _items("cluster", clusters, headings),
        "### Silhouette by number of clusters",
        _items("dictionary or control", silhouettes, " ".join(result["silhouette"])),
    ]


def _absorption(result: dict[str, Any]) -> list[str]:
    figures = "words probe_f1 main main_f1 known missed absorbed absorption absorption_fraction"
    means = _beside(result, "mean_absorption mean_absorption_fraction mean_split mean_main_f1")
    return [means, "### By letter", _items("letter", result["letters"], figures)]


def _mdl(result: dict[str, Any]) -> list[str]:
    if "settings" in result:
        return _mdl_by_saebench(result)
    parts = "bits_per_token active_bits value_bits uniform_bits bits_per_dimension fvu fvu_rounded width bins l0"
    equal = {name: scores or {} for name, scores in result["at_fvu_of"].items()}
    equal = _items("dictionary at the FVU of", equal, "bits_per_token width")
    return [_items("", {(): result}, "rows tokens"), _beside(result, parts), equal]


def _mdl_by_saebench(result: dict[str, Any]) -> list[str]:
    parts = _headings("bits_per_token active_bits value_bits bits_per_dimension fvu fvu_rounded num_bins k mse_loss l0")
    settings: dict[tuple[str, str], dict[str, float]] = {}
    for name, scores in _autoencoders(result).items():
        for setting in scores["settings"]:
            line = settings.setdefault((name, str(setting["num_bins"])), {"length": setting["description_length"]})
            line[f"k_{setting['k']}"] = setting["mse_loss"]
    errors = {f"k_{k}": f"error, k = {k}" for k in result["protocol"]["k_values"]}
    threshold = number(result["protocol"]["mse_epsilon_threshold"])
    return [
        "Protocol saebench, with SAEBench's bins, error and sum of entropies. The figures are those of the shortest length "
        f"with an error (root mean square / D) below {threshold}, or of the shortest of all if none has one.",
        _items("", {(): result}, "rows tokens"),
        _beside(result, {**parts, "value_bits": "bits: P(active) x entropy of bins, zeros included"}),
        "### Settings",
        _items("dictionary or control, bins", settings, {"length": "bits per token", **errors}),
    ]


def _meta_structure(result: dict[str, Any]) -> list[str]:
    figures = "meta_explained_variance train_explained_variance l0 latents meta_latents held_out"
    if not result["held_out"]:
        figures = "meta_explained_variance l0 latents meta_latents"
    headings = {**_headings(figures), "l0": "meta-latents per row", "latents": "decoder rows"}
    left_out = f"{number(result['dead'])} latents that don't fire are left out."
    about = [
        f"Protocol {result['protocol_name']}.",
        "All latents are used, also those that don't fire." if result["protocol_name"] == SAEBENCH else left_out,
        *([] if result["held_out"] else ["The score is of the rows that were trained on."]),
    ]
    blocks = [" ".join(about), _beside(result, headings)]
    if not result["largest"]:
        return blocks
    columns = {"count": "latents that use it", "members": "that use it most", "cosines": "cosine with them"}
    largest = {meta["meta_latent"]: meta for meta in result["largest"]}
    return [*blocks, "### Most used meta-latents of the dictionary", _items("meta-latent", largest, columns)]


def _sae_probes(result: dict[str, Any]) -> list[str]:
    ks, autoencoders = result["protocol"]["k_values"], _autoencoders(result)
    first, main = f"auc.{ks[0]}", f"auc.{result['protocol']['main_k']}"
    lines = [
        (
            heading,
            str(k),
            *(number(lookup(s, f"{figure}.{k}")) for s in autoencoders.values()),
            number(result["llm"][figure]),
        )
        for figure, heading in (("auc", "AUC"), ("accuracy", "accuracy"), ("f1", "F1"))
        for k in ks
    ]
    controls = [control for control in result["controls"] if control != "shuffled"]
    headings = {first: f"k = {ks[0]}", main: f"k = {result['protocol']['main_k']}"}
    headings |= {f"controls.{control}.{main}": f"{control}, {headings[main]}" for control in controls}
    headings |= {"llm.auc": "LM activations", "versus_random": "minus random", "versus_llm": "minus LM activations"}
    sets = {name: scores | _versus(scores, main) for name, scores in {"mean": result, **result["sets"]}.items()}
    sizes = "train_rows test_rows tokens latents reached_by"
    return [
        "LM activations: the paper's baseline, a probe on all of the model's activations. Means over data sets:",
        table(("", "k", *map(plain, autoencoders), "LM activations"), lines, (0,)),
        PICTURES,
        "### AUC by data set",
        f"Differences are those of {headings[main]}, paired by test text, with 95% intervals.",
        _items("set", sets, headings),
        "### Texts and latents",
        _items("set", {name: _first_latents(scores) for name, scores in result["sets"].items()}, sizes),
    ]


def _versus(scores: dict[str, Any], path: str) -> dict[str, str]:
    """Differences from random and from the baseline as text."""
    found = {}
    for other in ("random", "llm"):
        if (above := lookup(scores["intervals"], f"{path}.above_{other}")) is not None:
            found[f"versus_{other}"] = f"{above['difference']:+.3f} ({above['low']:+.3f} to {above['high']:+.3f})"
    return found


def _first_latents(scores: dict[str, Any]) -> dict[str, Any]:
    return scores | {"latents": scores["latents"][:5]}


def _ravel(result: dict[str, Any]) -> list[str]:
    lines = _autoencoders(result) | {"all of the activation": result["whole"]}
    figures = {"score": "score", "cause": "cause", "isolation": "isolation", "latents": "latents exchanged, mean"}
    by_attribute = figures | {"latents": "latents exchanged"}
    return [
        _items("", {(): result}, "prompts known pairs"),
        _items("exchanged", lines, figures),
        "### By attribute",
        _items("attribute", result["attributes"], by_attribute),
    ]


def _autointerp(result: dict[str, Any]) -> list[str]:
    judge = ", ".join(result["judge"].values())
    blocks = [f"Judge: {plain(judge)}", _beside(result, "score balanced none scored answers unparsable")]
    for name, scores in _autoencoders(result).items():
        blocks += [f"### Explanations: {name}", _items("latent", scores["latents"], "explanation score named active")]
    return blocks


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "core": _core, "sparse_probing": _sparse_probing, "sae_probes": _sae_probes,
    "positions": _positions, "ground_truth": _ground_truth,
    "unlearning": _unlearning, "scr": _scr, "tpp": _tpp, "clusters": _clusters, "absorption": _absorption,
    "mdl": _mdl, "meta_structure": _meta_structure, "ravel": _ravel, "autointerp": _autointerp,
}  # fmt: skip
