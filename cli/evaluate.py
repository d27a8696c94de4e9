"""`temposae eval`, `temposae features` and `temposae dashboard`: what is done with a trained dictionary."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..engine.storage.files import check_writable, write_json
from .options import FOLDERS, TEXTS, JsonFile, Plugin, check_backend
from .output import core_table, scores_table

Dictionary = Annotated[Path, typer.Option(help=FOLDERS)]


def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those above, or all.", show_default=False)],
    sae: Dictionary,
    model: Annotated[
        str | None, typer.Option(help="Evaluate in this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Evaluate after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Evaluate at this hook.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Evaluate on this text: {TEXTS}.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of whatever is drawn at random.")] = 0,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="sparse_probing: labelled texts, a .csv or .jsonl file with columns text and label, or a published set "
            "(fancyzhx/ag_news?path=FOLDER); may be repeated. [the embedded language's topics]",
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            metavar="NAME=PATH",
            help="unlearning: forget_questions, retain_questions (.jsonl or .parquet, WMDP's and MMLU's layout), "
            "forget_text and retain_text (.txt, .jsonl or .parquet), all four; positions: blimp (.jsonl), senteval. "
            "[the embedded language's own]",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**20,
            help="core: measure on so many rows of held-out text. [as training did, else as fit the model]",
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control", help="Train a random control first where there is none, on as many tokens as the run."
        ),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the run folder holds already.")] = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a dictionary, beside its controls. Results of a run are kept in its folder's evals/; report.html there shows
    them all.

    \b
    core            explained variance, CE and KL recovered, L0, dead latents, overall and per position
    sparse_probing  probes on the k latents that tell classes of text best
    positions       what latents tell of position, what reconstruction keeps of it, what is told by word order alone
    ground_truth    which known variables of the embedded language single latents name
    unlearning      can one subject's answers be turned while all others are kept
    scr, tpp        removing a spurious attribute, or one class, by ablating a few latents
    clusters        latents grouped by where in a row they are active
    absorption      first letters that a latent stands for, but for some words

    Without labels, questions or texts of its own, an eval uses the embedded language's; on another text it says what to
    give.
    """
    from ..engine.plugins import use
    from ..engine.process.signals import stop_advice
    from ..engine.storage import checkpoint
    from ..evals.api import stream_of
    from ..evals.run_evals import evaluate
    from ..evals.suite import EVALS, check_there, load_eval, named_files

    check_writable(json_file)
    check_backend()
    use(plugin)
    by_name = named_files(files or ())
    check_there(sets or (), by_name)
    names = list(EVALS) if name == "all" else [name]
    load_eval(names[0])
    loaded = checkpoint.find(sae)
    stream = stream_of(loaded, model, layer, hook, data, tokens=100_000)
    is_run = loaded.of_run is not None and all(option is None for option in (model, layer, hook, data))
    resume_note = "the evals that were finished are kept, and the same command goes on" if is_run else "nothing is kept"
    with stop_advice(f"stopped; {resume_note}"):
        results = evaluate(
            loaded, stream, sae if is_run else None, names, seed=seed, sets=sets or (), files=by_name, fresh=fresh,
            rows=rows, control=control,
        )  # fmt: skip
    write_json(json_file, results if name == "all" else results[name])
    for eval_name, result in results.items():
        title = f"{eval_name}: {loaded.folder} at {stream.model.hook} of {stream.model.name}"
        if "skipped" in result:
            print(f"{eval_name}: skipped; {result['skipped']}")
        elif eval_name == "core":
            core_table(result, title)
        else:
            scores_table(result, title)
    if is_run:
        print(f"report: {sae / 'report.html'}   {sae / 'report.md'}")


def features(
    sae: Dictionary,
    out: Annotated[Path, typer.Option(help="Folder of the store, new or empty.")],
    data: Annotated[str | None, typer.Option(help=f"Encode this text: {TEXTS}. [the one it was trained on]")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**15,
            help="Encode so many tokens. [as many as the run was trained on; of another --data, the whole text]",
        ),
    ] = None,
    min_activation: Annotated[float, typer.Option(min=0, max=1e15, help="Leave out activations up to this one.")] = 0.0,
    model: Annotated[
        str | None, typer.Option(help="Encode activations of this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Encode what is after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Encode what is at this hook.")] = None,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Encode a text once, in order, into a store in Parquet: which latents are active where, and how strongly.

    `temposae.features.read`, pandas and DuckDB read it.
    """
    from ..engine.plugins import use
    from ..engine.storage import checkpoint
    from ..evals import features as store
    from ..evals.api import BUFFERLESS, stream_of

    began = time.monotonic()
    check_writable(json_file)
    check_backend()
    use(plugin)
    store.check(out, tokens, min_activation)
    loaded = checkpoint.find(sae)
    if tokens is None and data is None and loaded.run is not None:
        tokens = loaded.run.train.tokens
        explanation = "" if isinstance(loaded, checkpoint.Loaded) else ", as many as the run was trained on"
        print(f"encoding {tokens:,} tokens{explanation}; --tokens gives another number", flush=True)
    stream = stream_of(loaded, model, layer, hook, data, tokens=1, repeat=False, **BUFFERLESS)
    totals = store.encode(loaded, stream, out, tokens=tokens, min_activation=min_activation)
    seconds = time.monotonic() - began
    command = {"seconds": round(seconds, 2), "tokens_per_s": round(totals["tokens"] / seconds, 1)}
    write_json(json_file, totals | {"command": command})
    speed = totals["speed"]
    print(
        f"{totals['tokens']:,} tokens in {totals['rows']:,} rows, {totals['entries']:,} entries, "
        f"{totals['entries'] / totals['tokens']:.1f} a token: {out}"
    )
    print(
        f"tokens/s: {speed['tokens_per_s']:,.0f} in all, {command['tokens_per_s']:,.0f} with loading; encoding alone "
        f"{speed['sparse_tokens_per_s']:,.0f}, {speed['sparse_over_dense']:.2f} times as many as by dense activations"
    )


def dashboard(
    sae: Dictionary,
    latents: Annotated[
        str | None,
        typer.Option(help="Numbers of latents, as in 3,17. [--count of them, over the ranks of firing rate]"),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10**6, help="How many latents, where none are named.")] = 100,
    rows: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, help="Rows of held-out text to look at. [1024; fewer after a short run]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page. [dashboard.html in the run folder]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Look at activations of this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Look after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Look at this hook.")] = None,
    data: Annotated[
        str | None, typer.Option(help=f"Look at this text: {TEXTS}. [what it was trained on, rows held out]")
    ] = None,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Make a page to look at latents one by one, a single HTML file.

    Of each: how often and where in a row it fires, the texts that it fires on most and some ordinary ones, and the tokens
    that it raises and lowers.
    """
    from ..engine.errors import UserError
    from ..engine.plugins import use
    from ..engine.storage import checkpoint
    from ..evals import dashboard as board
    from ..evals.api import BUFFERLESS, dashboard_rows, stream_of

    check_backend()
    use(plugin)
    loaded = checkpoint.find(sae)
    dictionary = loaded.dictionary()
    if out is None and loaded.of_run is None:
        raise UserError(f"out: needed; {sae} is not a run folder, give the page to write, as in dashboard.html")
    page = out or sae / "dashboard.html"
    check_writable(page, "out", board.is_page)
    check_writable(json_file)
    latent_numbers = None if latents is None else board.numbers(latents, dictionary.cfg.d_sae)
    stream = stream_of(loaded, model, layer, hook, data, tokens=1, **BUFFERLESS)
    rows = rows or dashboard_rows(loaded, stream)
    content = board.dashboard(
        stream, dictionary, name=sae.resolve().name, latents=latent_numbers, count=count, rows=rows
    )
    write_json(json_file, content)
    board.write(page, content)
    print(f"{len(content['latents'])} of {content['d_sae']:,} latents on {content['tokens']:,} tokens: {page}")
