"""`temposae eval`, `temposae features` and `temposae dashboard`: study a trained dictionary."""

import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..engine.errors import UserError
from ..engine.process.signals import stop_advice
from ..engine.storage.files import check_writable, write_json
from .options import FOLDERS, TEXTS, JsonFile, Plugin, check_backend
from .output import core_table, probes_table, scores_table

Dictionary = Annotated[Path, Option(help=FOLDERS)]
OtherModel = Annotated[
    str | None,
    Option(help="Language model: testbed, smollm2, a hub name or a local folder. [default: the one it was trained on]"),
]
OtherLayer = Annotated[int | None, Option(help="Layer of the residual stream, from 0. [default: where it was trained]")]
OtherHook = Annotated[str | None, Option(help="Use the activations at this transformer_lens hook instead.")]
OtherData = Annotated[str | None, Option(help=f"Text to use: {TEXTS}. [default: the text it was trained on]")]


def evaluate(
    name: Annotated[str, Argument(metavar="NAME", help="An eval listed above, or all.", show_default=False)],
    sae: Dictionary,
    model: OtherModel = None,
    layer: OtherLayer = None,
    hook: OtherHook = None,
    data: OtherData = None,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of all random choices.")] = 0,
    sets: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="For sparse_probing, tpp and scr: a .csv or .jsonl file with columns text and label "
            "(FILE?text=COLUMN&label=COLUMN; scr also needs &attribute=COLUMN), or a published set "
            "(fancyzhx/ag_news?path=FOLDER). For sparse_probing also topic, tone, items, poison, number or agent, labels of "
            "the embedded language. For sae_probes: quick (nine data sets), all (113) or a name such as 24_headline_isiran, "
            "with ?texts=N for fewer texts of each. Repeatable. [default: all six of the embedded language; quick]",
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        Option(
            "--file",
            metavar="NAME=PATH",
            help="For unlearning, all four of forget_questions, retain_questions (.jsonl or .parquet, in the formats of "
            "WMDP and MMLU), forget_text and retain_text (.txt, .jsonl or .parquet). For positions, blimp (.jsonl) and "
            "senteval. For ravel, ravel (.json, entities and templates). Repeatable. [default: the embedded language's; for "
            "positions, words of the text exchanged]",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        Option(
            min=1,
            max=2**20,
            help="For core: rows of held-out text to evaluate on. [default: as in training, or by the model's cost]",
        ),
    ] = None,
    controls: Annotated[
        str | None,
        Option(
            help="Train these controls first if the run lacks them: random, soft_frozen, frozen_encoder, as in a,b."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        Option(
            help="For positions: another run, whose latents are matched with the dictionary's by their activations."
        ),
    ] = None,
    same_recipe: Annotated[
        Path | None, Option(help="For positions: another seed of the reference's recipe, as a yardstick of agreement.")
    ] = None,
    protocol: Annotated[
        str,
        Option(
            metavar="temposae|saebench",
            help="For mdl, meta_structure, tpp and scr: saebench measures as SAEBench does (docs/evals.md lists the "
            "differences) and, except for mdl, writes its result files.",
        ),
    ] = "temposae",
    judge_command: Annotated[
        str | None,
        Option(
            metavar="'PROGRAM ARGUMENTS'",
            help="For autointerp: a program that reads a prompt on standard input and writes the answer. No shell runs it.",
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        Option(
            help="For autointerp: the address of an OpenAI-compatible model, as in http://HOST/v1. Its key is read from the "
            "environment variable TEMPOSAE_JUDGE_KEY."
        ),
    ] = None,
    judge_model: Annotated[str | None, Option(help="The model's name at --judge-url.")] = None,
    judge_timeout: Annotated[float, Option(help="Seconds to wait for an answer of the judge.")] = 120.0,
    judge_latents: Annotated[
        int, Option(min=2, max=10**6, help="Latents per dictionary that the judge explains.")
    ] = 20,
    fresh: Annotated[bool, Option("--fresh", help="Repeat evals that the run folder already has.")] = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a dictionary and its controls.

    Results of a run are saved in evals/ in its folder, and report.html shows all of them.

    \b
    core            explained variance, CE and KL recovered, L0 and dead latents, overall and per position
    sparse_probing  accuracy of classifiers that see only the k best latents
    sae_probes      the data sets of sae-probes: AUC of classifiers on k latents of the last token
    positions       position information in latents and reconstructions, and sensitivity to word order
    ground_truth    known variables of the embedded language that a few latents reconstruct
    unlearning      answers about one subject removed while all others are kept
    clusters        latents grouped by the positions at which they are active
    absorption      first-letter latents that miss some of their words
    mdl             bits per token that the codes need, beside their reconstruction error
    meta_structure  how far decoder rows are sums of a few shared directions (neither more nor less is better)
    ravel           an attribute of an entity changed by exchanging latents, while its other attributes stay
    tpp, scr        one class, or a spurious attribute, removed by ablating a few latents (docs/evals.md: unreliable)
    autointerp      how well a judge's explanations of latents predict where they fire; all includes it if a judge is given

    Labels, questions and texts default to the embedded language's. On another text, core, positions, clusters, absorption,
    mdl and meta_structure need nothing else. The others say which option supplies their labels or questions, and all ends
    with a list of them.
    """
    from ..engine.storage import checkpoint
    from ..evals.api import stream_of
    from ..evals.coverage import summary
    from ..evals.evaluation import check_protocol
    from ..evals.judge import Judge
    from ..evals.report_tables import main_scores
    from ..evals.run_evals import evaluate
    from ..evals.suite import check_there, every_eval, load_eval, named_files

    check_backend()
    check_protocol(protocol)
    by_name = named_files(files or ())
    judge = None
    if any(option is not None for option in (judge_command, judge_url, judge_model)):
        judge = Judge.of(judge_command, judge_url, judge_model, timeout=judge_timeout, latents=judge_latents)
    names = every_eval(judge) if name == "all" else [name]
    check_there(sets or (), by_name, names)
    load_eval(names[0])
    others: dict[str, Any] = {
        name: checkpoint.find(folder, name)
        for name, folder in (("reference", reference), ("same_recipe", same_recipe))
        if folder is not None
    }
    loaded = checkpoint.find(sae)
    stream = stream_of(loaded, model, layer, hook, data, tokens=100_000)
    is_run = loaded.of_run is not None and all(option is None for option in (model, layer, hook, data))
    resume_note = "finished evals are saved, and the same command continues" if is_run else "nothing is saved"
    with stop_advice(f"stopped; {resume_note}"):
        results = evaluate(
            loaded, stream, sae if is_run else None, names, seed=seed, sets=sets or (), files=by_name, fresh=fresh,
            rows=rows, controls=controls.split(",") if controls else (), protocol=protocol, judge=judge,
            **others,
        )  # fmt: skip
    write_json(json_file, results if name == "all" else results[name])
    for eval_name, result in results.items():
        title = f"{eval_name}: {loaded.folder} at {stream.model.hook} of {stream.model.name}"
        if "skipped" in result:  # `summary` has it
            continue
        if eval_name == "core":
            core_table(result, title)
        elif eval_name == "sae_probes":
            probes_table(result, title)
        else:
            scores_table(result, title, main_scores(eval_name, result))
    if name == "all":
        print(*summary(results), sep="\n")
    if is_run:
        print(f"report: {sae / 'report.html'}   {sae / 'report.md'}")


def features(
    sae: Dictionary,
    out: Annotated[Path, Option(help="Folder to write the store to, new or empty.")],
    data: OtherData = None,
    tokens: Annotated[
        int | None,
        Option(
            min=1,
            max=10**15,
            help="Number of tokens to encode. [default: as many as the run trained on; with --data, the whole text]",
        ),
    ] = None,
    min_activation: Annotated[float, Option(min=0, max=1e15, help="Store only activations above this value.")] = 0.0,
    model: OtherModel = None,
    layer: OtherLayer = None,
    hook: OtherHook = None,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Encode a text into a Parquet store of active latents.

    The store has one entry per token and active latent, in text order. Read it with `temposae.features.read`, pandas or
    DuckDB.
    """
    from ..engine.storage import checkpoint
    from ..evals import features as store
    from ..evals.api import BUFFERLESS, stream_of

    began = time.monotonic()
    check_backend()
    store.check(out, tokens, min_activation)
    loaded = checkpoint.find(sae)
    if tokens is None and data is None and loaded.run is not None:
        tokens = loaded.run.train.tokens
        explanation = "" if isinstance(loaded, checkpoint.Loaded) else ", as many as the run trained on"
        print(f"encoding {tokens:,} tokens{explanation}; --tokens sets another number", flush=True)
    stream = stream_of(loaded, model, layer, hook, data, tokens=1, repeat=False, **BUFFERLESS)
    totals = store.encode(loaded, stream, out, tokens=tokens, min_activation=min_activation)
    seconds = time.monotonic() - began
    command = {"seconds": round(seconds, 2), "tokens_per_s": round(totals["tokens"] / seconds, 1)}
    write_json(json_file, totals | {"command": command})
    speed = totals["speed"]
    print(
        f"{totals['tokens']:,} tokens in {totals['rows']:,} rows, {totals['entries']:,} entries, "
        f"{totals['entries'] / totals['tokens']:.1f} per token: {out}"
    )
    print(
        f"tokens/s: {speed['tokens_per_s']:,.0f} overall, {command['tokens_per_s']:,.0f} including loading, "
        f"{speed['sparse_tokens_per_s']:,.0f} for encoding alone ({speed['sparse_over_dense']:.2f} x dense encoding)"
    )


def dashboard(
    sae: Dictionary,
    latents: Annotated[
        str | None, Option(help="Latents, as in 3,17. [default: --count of them, spread over firing rates]")
    ] = None,
    count: Annotated[int, Option(min=1, max=10**6, help="Number of latents, unless --latents names them.")] = 100,
    rows: Annotated[
        int | None, Option(min=1, max=2**20, help="Rows of held-out text. [default: 1024, fewer after a short run]")
    ] = None,
    out: Annotated[Path | None, Option(help="HTML file to write. [default: dashboard.html in the run folder]")] = None,
    model: OtherModel = None,
    layer: OtherLayer = None,
    hook: OtherHook = None,
    data: OtherData = None,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Write an HTML page that shows latents one by one.

    For each latent: how often and at which positions it fires, the texts on which it fires most, some random ones, and the
    tokens whose logits it raises and lowers.
    """
    from ..engine.storage import checkpoint
    from ..evals import dashboard as board
    from ..evals.api import BUFFERLESS, dashboard_rows, stream_of

    check_backend()
    loaded = checkpoint.find(sae)
    dictionary = loaded.dictionary()
    if out is None and loaded.of_run is None:
        raise UserError(f"out: missing; {sae} is not a run folder, so give the HTML file to write")
    page = out or sae / "dashboard.html"
    check_writable(page, "out", board.is_page)
    numbers = None if latents is None else board.numbers(latents, dictionary.cfg.d_sae)
    stream = stream_of(loaded, model, layer, hook, data, tokens=1, **BUFFERLESS)
    rows = rows or dashboard_rows(loaded, stream)
    content = board.dashboard(stream, dictionary, name=sae.resolve().name, latents=numbers, count=count, rows=rows)
    write_json(json_file, content)
    board.write(page, content)
    print(f"{len(content['latents'])} of {content['d_sae']:,} latents on {content['tokens']:,} tokens: {page}")
