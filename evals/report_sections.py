"""What a report says of each eval: its scores beside its controls, and its own tables, as Markdown."""

from collections.abc import Callable
from typing import Any

from ..engine.stream.norm_filter import describe
from .markdown_page import number, plain, table

CONTROLS = ("random", "lm_neurons", "mean", "shuffled")  # in the order in which they are shown
PICTURES = "pictures"  # a block that stands for a section's figures

#: eval -> what it asks
ASKS = {
    "core": "How much of the activation comes back, at which sparsity, and what the model loses by it.",
    "sparse_probing": "Can a probe on k latents tell classes of text? Test accuracy, 0.5 is chance.",
    "positions": "What latents tell of position, what reconstruction keeps of it, and what is told by word order alone.",
    "ground_truth": "Which known variables of the embedded language does a single latent name?",
    "unlearning": "Can one subject's answers be turned while 99% of the others are kept?",
    "scr": "How much of a spurious correlation goes when n latents are ablated: 0 none, 1 all of it.",
    "tpp": "What one class loses when its n latents are ablated, less what the others lose.",
    "clusters": "Latents grouped by where in a row they are active, and whether the same groups are found again.",
    "absorption": "First letters that a latent stands for, but for some words; few, too, where none stands for letters.",
}


def section(name: str, result: dict[str, Any]) -> list[str]:
    """Blocks of Markdown: the tables of a result, with `PICTURES` where its figures go; of an eval that isn't known here a
    general one."""
    return SECTIONS[name](result) if name in SECTIONS else [_beside(result, shown(result))]


def lookup(scores: dict[str, Any], path: str) -> Any:
    """The figure at a path such as "fidelity.profile"; None where there is none."""
    value: Any = scores
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def shown(result: dict[str, Any]) -> dict[str, str]:
    """Label -> path of the plain figures of an eval that isn't known here."""
    return {
        key.replace("_", " "): key for key, value in result.items() if isinstance(value, float) and key != "seconds"
    }


def _autoencoders(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of the dictionary and of each control, by name."""
    controls = result.get("controls", {})
    known = {name: controls[name] for name in CONTROLS if name in controls}
    return {"dictionary": result, **known, **controls}


def _beside(result: dict[str, Any], scores: dict[str, str]) -> str:
    """Scores, by label and path, of the dictionary and its controls."""
    autoencoders = _autoencoders(result)
    lines = [
        (plain(label), *(number(lookup(figures, path)) for figures in autoencoders.values()))
        for label, path in scores.items()
    ]
    return table(("", *map(plain, autoencoders)), lines)


def _by_n(result: dict[str, Any], value: Callable[[dict[str, Any], str], float | None]) -> str:
    """A figure with its spread over seeds, of every autoencoder, by the number of latents ablated."""

    def cell(scores: dict[str, Any], n: str) -> str:
        figure, spread = value(scores, n), scores["spread"][n]
        return number(figure) if figure is None or spread is None else f"{number(figure)} ± {number(spread)}"

    every = _autoencoders(result)
    lines = [(n, *(cell(scores, n) for scores in every.values())) for n in result["spread"]]
    return table(("n", *map(plain, every)), lines, ())


def _core(result: dict[str, Any]) -> list[str]:
    scores = {
        "explained variance": "explained_variance",
        "explained variance, as SAEBench works it out": "saebench.explained_variance",
        "explained variance, SAEBench's legacy one": "saebench.explained_variance_legacy",
        "CE recovered": "ce_recovered", "CE recovered over mean ablation": "ce_recovered_over_mean",
        "KL recovered": "kl_recovered", "L0 (latents a token)": "l0", "dead latents (share)": "dead_fraction",
        "MSE": "mse", "cosine of x and x_hat": "cosine", "norm of x_hat / norm of x": "l2_ratio",
        "relative reconstruction bias": "relative_reconstruction_bias", "L1": "l1",
    }  # fmt: skip
    places = {
        "clean": "nothing: the model as it is", "zero": "zeros", "mean": "the mean", "sae": "the dictionary's",
        "random": "random's", "lm_neurons": "the K largest neurons",
    }  # fmt: skip
    spliced = [
        (places.get(name, plain(name)), number(ce), number(lookup(result, f"kl.{name}")))
        for name, ce in result["ce"].items()
    ]
    measured = f"{number(result['tokens'])} tokens of {number(result['rows'])} held-out rows"
    massive = describe(result["massive"])
    return [
        f"Measured on {measured}; CE and KL on {number(result['ce_tokens'])} tokens.",
        *([] if massive is None else [f"{plain(massive[0].upper() + massive[1:])}."]),
        _beside(result, scores),
        PICTURES,
        "### Loss with something else in the activation's place",
        table(("in its place", "CE (nats)", "KL (nats)"), spliced),
    ]


def _sparse_probing(result: dict[str, Any]) -> list[str]:
    ks = sorted(int(k) for key in result if (k := key.removeprefix("top_")).isdecimal())
    sets = result["sets"] if len(result["sets"]) == 1 else {"mean over sets": result, **result["sets"]}
    lines = []
    for name, scores in sets.items():
        for autoencoder, accuracies in (_autoencoders(scores) | {"LM activations": scores["llm"]}).items():
            figures = (number(accuracies.get(key)) for key in (*(f"top_{k}" for k in ks), "test_accuracy"))
            lines.append((plain(name), plain(autoencoder), *figures))
    classes = [
        (plain(name), plain(label), number(counts["top_1"]), number(counts["train_rows"]), number(counts["test_rows"]))
        for name, scores in result["sets"].items()
        for label, counts in scores["classes"].items()
    ]
    return [
        "" if result["top_1_error"] is None else f"The standard error of top 1 is {number(result['top_1_error'])}.",
        table(("set", "read from", *(f"top {k}" for k in ks), "all"), lines, (0, 1)),
        PICTURES,
        "### By class",
        table(("set", "class", "top 1", "training rows", "test rows"), classes, (0, 1)),
    ]


def _positions(result: dict[str, Any]) -> list[str]:
    paths = {
        "specialization": "specialization", "mutual information (nats)": "mutual_information",
        "nats per firing": "nats_per_firing", "variance explained": "variance_explained",
        "share above 0.05 nats": "positional_share", "share with rank correlation above 0.4": "spearman_share",
        "latents that fire": "alive",
    }  # fmt: skip
    later = {label: f"after_first_8.{path}" for label, path in paths.items()}
    blocks = [
        "### Specialization",
        _beside(result, paths),
        "### Specialization from position 8 on",
        _beside(result, later),
    ]
    if (retention := result.get("retention")) is not None:
        blocks.append(
            f"Of the reference's specialization {number(retention['value'])} is retained; {number(retention['matched'])} of "
            "its latents have a match."
        )
    if (sliced := result.get("slicing")) is not None:
        keys = ("specialization", "explained_variance", "l0")
        lines = [(name, *(number(slice_scores[key]) for key in keys)) for name, slice_scores in sliced.items()]
        blocks += [
            "### Slicing: specialization without training",
            "The dictionary with each latent shut off but for one range of positions, but for positions drawn at random, "
            "and as it is. Specialization that costs more explained variance than slicing is worth nothing.",
            table(("slices", "specialization", "explained variance", "L0"), lines),
        ]
    if (fidelity := result.get("fidelity")) is not None:
        blocks += ["### Fidelity: as good late in a row as early?", *_fidelity(fidelity)]
    if (order := result.get("order_probing")) is not None:
        blocks.append("### Order probing: two texts, the same words")
        blocks += [f"Skipped: {plain(order['skipped'])}."] if "skipped" in order else _order(order)
    return blocks


def _fidelity(result: dict[str, Any]) -> list[str]:
    scores = {"positional profile kept": "profile"}
    for key, label in (("explained_variance", "explained variance"), ("ce_recovered", "CE recovered")):
        scores |= {f"{label}, mean of bins": f"{key}.mean", f"{label}, worst bin": f"{key}.worst"}
    for shift in result["shifts"]:
        scores |= {
            f"latents that stay when text stands {shift} later": f"shifts.{shift}.stay",
            f"Jaccard, {shift} later": f"shifts.{shift}.jaccard",
        }
    every = _autoencoders(result)
    keys = {"EV": "explained_variance", "CE": "ce_recovered"}
    lines = [
        (f"{first}–{last}", *(number(figures[key]["by_bin"][i]) for key in keys.values() for figures in every.values()))
        for i, (first, last) in enumerate(result["bins"])
    ]
    headings = (f"{label}, {plain(name)}" for label in keys for name in every)
    note = "By positions, EV is explained variance, and CE is CE recovered:"
    return [_beside(result, scores), note, table(("positions", *headings), lines)]


def _order(result: dict[str, Any]) -> list[str]:
    k = result["k"]
    readings = ("mean_pooled", "last_token")
    means = {reading.replace("_", " "): reading for reading in readings}
    lines = [
        (
            plain(task), reading.replace("_", " "), number(scores["bow"]), number(scores["top_1"][reading]),
            number(scores[reading]), number(scores["lm"][reading]), number(scores["normalised"][reading]),
            number(scores["test"]),
        )
        for task, scores in result["tasks"].items()
        for reading in readings
    ]  # fmt: skip
    headings = (
        "task", "read", "bag of words", "1 latent", f"{k} latents", "LM activations", "normalised", "test texts"
    )  # fmt: skip
    return [
        f"Accuracy on {k} latents in the mean over tasks; words in any order have {number(result['bow'])}.",
        _beside(result, means),
        PICTURES,
        table(headings, lines, (0, 1)),
    ]


def _ground_truth(result: dict[str, Any]) -> list[str]:
    scores = {
        "recovered (share with F1 of 0.8)": "recovered", "mean F1 of the best latent": "mean_f1",
        "mean accuracy of a probe on 5": "mean_top_5",
    }  # fmt: skip
    levels = result["recovered_at"]
    keys = ("f1", "precision", "recall", "top_5", "tokens")
    variables = sorted(result["variables"].items(), key=lambda item: -item[1]["f1"])
    return [
        _beside(result, scores),
        PICTURES,
        "### Share of variables recovered at an F1 of",
        table([f"{level['f1']:.2f}" for level in levels], [[number(level["share"]) for level in levels]], ()),
        "### By variable",
        table(
            ("variable", "latent", "F1", "precision", "recall", "top 5", "tokens"),
            [
                (plain(name), str(variable["latent"]), *(number(variable[key]) for key in keys))
                for name, variable in variables
            ],
        ),
    ]


def _unlearning(result: dict[str, Any]) -> list[str]:
    questions, every = result["questions"], _autoencoders(result)
    blocks = [
        f"Questions that the model knows: {number(questions['forget'])} to forget, {number(questions['retain'])} to "
        f"retain, each in {number(result['answer_orders'])} order(s) of answers. Mean norm of the activations: "
        f"{number(result['activation_norm'])}."
        + (
            ""
            if result["loss_increase"] is None
            else f" The best setting adds {number(result['loss_increase'])} nats per token to the loss on text to retain."
        ),
        _beside(result, {"score": "score", "retained": "retained"}),
    ]
    reasons = [
        f"- {plain(name)} scores 0: {plain(figures['reason'])}"
        for name, figures in every.items()
        if figures.get("reason")
    ]
    blocks += ["\n".join(reasons), PICTURES] if reasons else [PICTURES]
    best = {name: figures["setting"] for name, figures in every.items() if figures["setting"] is not None}
    headings = ("retain threshold", "latents", "taken", "multiplier", "forget accuracy", "retain accuracy")
    if best:
        blocks += ["### Best settings", table(("", *headings), [(plain(n), *_setting(s)) for n, s in best.items()])]
    settings = [(*_setting(setting), number(setting["counts"])) for setting in result["settings"]]
    return [*blocks, "### All settings of the dictionary", table((*headings, "counts"), settings, ())]


def _setting(setting: dict[str, Any]) -> tuple[str, ...]:
    exact = (f"{setting[key]:g}" for key in ("retain_threshold", "latents", "taken", "multiplier"))
    return (*exact, *(number(setting[f"{side}_accuracy"]) for side in ("forget", "retain")))


def _scr(result: dict[str, Any]) -> list[str]:
    names = ("clean_topic", "clean_tone", "base_topic", "base_tone")
    pairs = [
        (plain(pair), *(number(pair_scores[name]) for name in names), *map(number, pair_scores["scr_metric"].values()))
        for pair, pair_scores in result["sets"].items()
    ]
    headings = (*(name.replace("_", " ") for name in names), *(f"n = {n}" for n in result["scr_metric"]))
    return [
        f"Mean over pairs and {result['seeds']} seeds ± standard deviation over seeds; the score is that at the largest n "
        "up to 20.",
        _by_n(result, lambda scores, n: scores["scr_metric"][n]),
        PICTURES,
        "### By pair",
        "Accuracies where topic and tone are independent: clean, of a probe trained where they are, too; base, of one "
        "trained where they are one. Then the metric.",
        table(("pair", *headings), pairs),
    ]


def _tpp(result: dict[str, Any]) -> list[str]:
    lines = [
        (n, *(number(effect[key]) for key in ("total_metric", "intended_diff_only", "unintended_diff_only")))
        for n, effect in result["tpp"].items()
    ]
    return [
        f"Probes on {len(result['classes'])} classes, right on {number(result['clean_accuracy'])} before; mean over "
        f"{result['seeds']} seeds ± standard deviation over seeds; the score is that at the largest n up to 10.",
        _by_n(result, lambda scores, n: scores["tpp"][n]["total_metric"]),
        PICTURES,
        "### The dictionary's in parts",
        table(("n", "total", "lost by the class", "lost by the others"), lines, ()),
    ]


def _clusters(result: dict[str, Any]) -> list[str]:
    scores = {
        "clusters": "count", "latents clustered": "latents", "mean distance within": "within",
        "mean distance between": "between", "stability (adjusted Rand index)": "stability.adjusted_rand",
        "its standard deviation": "stability.spread",
    }  # fmt: skip
    blocks = [_beside(result, scores)]
    if (seeds := result.get("seeds")) is not None:
        blocks.append(
            f"Against the other dictionary the adjusted Rand index is {number(seeds['adjusted_rand'])}, over "
            f"{number(seeds['matched'])} latents that match."
        )
    if not result["clusters"]:
        return [*blocks, "Too few latents fire often enough to be clustered."]
    lines = [
        (str(i), number(cluster["size"]), str(1 + max(range(len(p)), key=p.__getitem__)), number(max(p)))
        for i, cluster in enumerate(result["clusters"], 1)
        for p in (cluster["profile"],)
    ]
    counts = list(result["silhouette"])
    every = _autoencoders(result)
    silhouettes = [
        (plain(name), *(number((figures["silhouette"] or {}).get(n)) for n in counts))
        for name, figures in every.items()
    ]
    return [
        *blocks,
        PICTURES,
        "### Clusters of the dictionary",
        table(("cluster", "latents", f"most active in bin (of {result['bins']})", "share there"), lines, ()),
        "### Silhouette by number of clusters",
        table(("", *counts), silhouettes),
    ]


def _absorption(result: dict[str, Any]) -> list[str]:
    counts = ("known", "missed", "absorbed")
    lines = [
        (
            plain(letter), number(scores["words"]), number(scores["probe_f1"]), ", ".join(map(str, scores["main"])),
            number(scores["main_f1"]), *(number(scores[key]) for key in counts), number(scores["absorption"]),
            number(scores["absorption_fraction"]),
        )
        for letter, scores in result["letters"].items()
    ]  # fmt: skip
    headings = ("letter", "words", "probe's F1", "main latents", "their F1", *counts, "absorption", "fraction")
    return [
        _beside(
            result,
            {
                "mean absorption": "mean_absorption",
                "mean fraction": "mean_absorption_fraction",
                "main latents of a letter": "mean_split",
                "mean F1 of the main latents": "mean_main_f1",
            },
        ),
        "### By letter",
        table(headings, lines),
    ]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "positions": _positions,
    "ground_truth": _ground_truth,
    "unlearning": _unlearning,
    "scr": _scr,
    "tpp": _tpp,
    "clusters": _clusters,
    "absorption": _absorption,
}
