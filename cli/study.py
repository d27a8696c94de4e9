"""`temposae eval`, `temposae features` and `temposae dashboard`: what is done with a trained dictionary."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.files import check_writable, write_json
from .options import FOLDERS, JsonFile, check_backend
from .tables import core_table, scores_table

if TYPE_CHECKING:
    from ..engine.checkpoint import Checkpoint
    from ..engine.stream import ActivationStream


Dictionary = Annotated[Path, typer.Option(help=FOLDERS)]


def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those above, or all.", show_default=False)],
    sae: Dictionary,
    model: Annotated[
        str | None, typer.Option(help="Evaluate in this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Evaluate after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Evaluate at this hook.")] = None,
    data: Annotated[str | None, typer.Option(help="Evaluate on this text.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of whatever is drawn at random.")] = 0,
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
            help="unlearning: forget_questions, retain_questions (WMDP's and MMLU's layout), forget_text and retain_text, "
            "all four; positions: blimp, senteval. [the embedded language's own]",
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="core: measure on so many rows of held-out text. [as training did, else as fit the model]"
        ),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control", help="Train a random control first where there is none, on as many tokens as the run."
        ),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the run folder holds already.")] = False,
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
    from ..engine import checkpoint
    from ..engine.signals import stop_advice
    from ..evals.run import evaluate
    from ..evals.suite import EVALS, load_eval, named_files

    check_writable(json_file)
    check_backend()
    by_name = named_files(files or ())
    names = list(EVALS) if name == "all" else [name]
    load_eval(names[0])
    found = checkpoint.find(sae)
    stream = _stream_of(found, model, layer, hook, data, tokens=100_000)
    is_run = sae != found.folder and all(option is None for option in (model, layer, hook, data))
    kept = "the evals that were finished are kept, and the same command goes on" if is_run else "nothing is kept"
    with stop_advice(f"stopped; {kept}"):
        results = evaluate(
            found, stream, sae if is_run else None, names, seed=seed, sets=sets or (), files=by_name, fresh=fresh,
            rows=rows, control=control,
        )  # fmt: skip
    write_json(json_file, results if name == "all" else results[name])
    for each, result in results.items():
        title = f"{each}: {found.folder} at {stream.model.hook} of {stream.model.name}"
        if "skipped" in result:
            print(f"{each}: skipped; {result['skipped']}")
        elif each == "core":
            core_table(result, title)
        else:
            scores_table(result, title)
    if is_run:
        print(f"report: {sae / 'report.html'}   {sae / 'report.md'}")


def features(
    sae: Dictionary,
    out: Annotated[Path, typer.Option(help="Folder of the store, new or empty.")],
    data: Annotated[str | None, typer.Option(help="Encode this text. [the one it was trained on]")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Encode so many tokens. [the whole text; needed for the embedded language]")
    ] = None,
    min_activation: Annotated[float, typer.Option(help="Leave out activations up to this one.")] = 0.0,
    model: Annotated[
        str | None, typer.Option(help="Encode activations of this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Encode what is after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Encode what is at this hook.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Encode a text once, in order, into a store in Parquet: which latents are active where, and how strongly.

    `temposae.features.read`, pandas and DuckDB read it.
    """
    from ..engine import checkpoint
    from ..evals import features as store

    began = time.monotonic()
    check_writable(json_file)
    check_backend()
    store.check(out, tokens, min_activation)
    found = checkpoint.find(sae)
    no_buffer: dict[str, Any] = {"mode": "tokens", "buffer_tokens": None, "buffer_gb": None}
    stream = _stream_of(found, model, layer, hook, data, tokens=1, repeat=False, **no_buffer)
    written = store.encode(found, stream, out, tokens=tokens, min_activation=min_activation)
    seconds = time.monotonic() - began
    command = {"seconds": round(seconds, 2), "tokens_per_s": round(written["tokens"] / seconds, 1)}
    write_json(json_file, written | {"command": command})
    speed = written["speed"]
    print(
        f"{written['tokens']:,} tokens in {written['rows']:,} rows, {written['entries']:,} entries, "
        f"{written['entries'] / written['tokens']:.1f} a token: {out}"
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
    count: Annotated[int, typer.Option(min=1, help="How many latents, where none are named.")] = 100,
    rows: Annotated[int, typer.Option(min=1, help="Rows of held-out text to look at.")] = 1024,
    out: Annotated[Path | None, typer.Option(help="The page. [dashboard.html in the run folder]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Look at activations of this model instead of the one it was trained on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Look after this layer.")] = None,
    hook: Annotated[str | None, typer.Option(help="Look at this hook.")] = None,
    data: Annotated[str | None, typer.Option(help="Look at this text. [what it was trained on, rows held out]")] = None,
    json_file: JsonFile = None,
) -> None:
    """Make a page to look at latents one by one, a single HTML file.

    Of each: how often and where in a row it fires, the texts that it fires on most and some ordinary ones, and the tokens
    that it raises and lowers.
    """
    from ..engine import checkpoint
    from ..engine.errors import UserError
    from ..evals import dashboard as board

    check_backend()
    found = checkpoint.find(sae)
    dictionary = found.dictionary()
    if out is None and sae == found.folder:
        raise UserError(f"out: needed; {sae} is not a run folder, give the page to write, as in dashboard.html")
    page = out or sae / "dashboard.html"
    check_writable(page, "out")
    check_writable(json_file)
    wanted = None if latents is None else board.numbers(latents, dictionary.cfg.d_sae)
    no_buffer: dict[str, Any] = {"mode": "tokens", "buffer_tokens": None, "buffer_gb": None}
    stream = _stream_of(found, model, layer, hook, data, tokens=1, **no_buffer)
    shown = board.dashboard(stream, dictionary, name=sae.resolve().name, latents=wanted, count=count, rows=rows)
    write_json(json_file, shown)
    board.write(page, shown)
    print(f"{len(shown['latents'])} of {shown['d_sae']:,} latents on {shown['tokens']:,} tokens: {page}")


def _stream_of(
    found: "Checkpoint", model: str | None, layer: int | None, hook: str | None, data: str | None, *,
    tokens: int, **settings: Any,
) -> "ActivationStream":  # fmt: skip
    """The stream that a dictionary was trained on, with what the options and `settings` change of it. Where another library
    saved it, what its folder says of model and hook is used, and told."""
    from ..engine.checkpoint import Loaded
    from ..engine.config import StreamConfig
    from ..engine.errors import UserError
    from ..engine.interchange.places import stream_settings
    from ..engine.stream import ActivationStream, LanguageModel

    found.expect("sae")
    run, said = found.run, stream_settings(found.where)
    if run is not None and run.stream.activations is not None and model is None:
        raise UserError(
            f"model: {found.folder} was trained on {run.stream.activations}, without a model; give --model, and "
            "--hook or --layer"
        )
    if model is None and said.get("model") is None:
        at = said.get("hook")
        unsaid = f"says {at}, but not of which model" if at else "does not say what it was trained on"
        raise UserError(f"model: {found.folder} {unsaid}; give --model{'' if at else ', and --hook or --layer'}")
    trained_on = run.stream if run is not None else StreamConfig(**said)
    drop = {"activations"} | ({"hook"} if layer is not None or not said else set())
    given: dict[str, Any] = {k: v for k, v in {"model": model, "hook": hook, "data": data}.items() if v is not None}
    config = StreamConfig(**(trained_on.model_dump(exclude=drop) | given | settings))
    if any(option is not None for option in (model, layer, hook, data)):
        config = config.model_copy(update={"cache": None})  # another model, place or text than it holds
    if isinstance(found, Loaded):
        used = {name: said[name] for name in ("model", "hook", "data") if said.get(name) is not None}
        used = [f"{name} {value}" for name, value in used.items() if value == getattr(config, name)]
        if used:
            print(f"{found.folder} says: {', '.join(used)}")
    lm = LanguageModel(config.model, hook=config.hook, layer=layer)
    if config.target is not None:
        lm.use(hooks=[lm.hook, lm.place(config.target)])
    seed = run.train.seed if run is not None else 0
    stream = ActivationStream(config, tokens=tokens, seed=seed, model=lm)
    if model is None and layer is None and hook is None:
        stream.norms.load_report(found.massive)
    return stream
