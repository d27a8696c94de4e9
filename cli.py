"""The command line. Heavy imports wait until a command needs them, so that --help is quick."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench.cli import bench_app, profile
from .engine.files import check_writable, write_json

if TYPE_CHECKING:
    from .engine.checkpoint import Checkpoint
    from .engine.stream import ActivationStream

_plain: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": None}
app = typer.Typer(help="Train and study sparse autoencoders on language-model activations.", **_plain)
testbed_app = typer.Typer(help="The embedded language and the small language model that learned it.", **_plain)
app.add_typer(testbed_app, name="testbed")
app.add_typer(bench_app, name="bench")

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Model = Annotated[
    str | None,
    typer.Option(help="testbed, smollm2, a hub name (google/gemma-2-2b) or a local Hugging Face folder. [testbed]"),
]
Layer = Annotated[int | None, typer.Option(help="Train on the residual stream after this layer. [the middle one]")]
Hook = Annotated[str | None, typer.Option(help="Train at this transformer_lens hook instead.")]
Data = Annotated[
    str | None,
    typer.Option(help="A .txt or .jsonl file, or a dataset's name or folder. [the embedded language, for testbed]"),
]


def main() -> None:
    """Entry point: runs the command; a user's mistake becomes one line and exit code 2."""
    from .engine.errors import Stopped, UserError

    # OpenMP threads that spin while they wait make a step ten times slower as soon as another program wants a core. Read
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1" and sys.argv[1:2] not in (["train"], ["--help"]):
            given = " ".join(sys.argv[1:2])
            raise UserError(f"torchrun: temposae {given} is not allowed; only temposae train runs in several processes")
        app()
    except UserError as error:
        _leave_to_the_first()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started: all of them have
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except (RuntimeError, MemoryError) as error:
        named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")  # torch's, which is not imported here
        if not named and "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise  # on the CPU torch raises a plain RuntimeError
        print("error: out of memory; try a smaller sae.d_sae, train.batch or stream.buffer_tokens", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that fills up, a file that goes away
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _leave_to_the_first() -> None:
    """Of several processes that torchrun started, the first tells what all have met; the others wait until torchrun ends
    them, or tell what only they have."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            show_default=False,
            help="YAML with sections stream, sae, train; with sweep or dictionaries for several on one stream. "
            "Options win over it.",
        ),
    ] = None,
    model: Model = None,
    layer: Layer = None,
    hook: Hook = None,
    data: Data = None,
    cache: Annotated[
        Path | None, typer.Option(help="Read activations from this folder, which `temposae cache` made.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(help="Train on the activations in this .npy, .safetensors or .pt file, without a model."),
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="F, the number of latents. [8 times the model's width]")] = None,
    k: Annotated[int | None, typer.Option(help="Latents kept per token. [32]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [2e-4 * sqrt(2^14 / F)]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. [1000000]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, text order and mixing. [0]")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. [runs/MODEL-DATE-TIME]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the stopped run in --out, with its settings.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a dictionary, with its random control beside it; measure both; draw the figures.

    With a section sweep (k: [16, 32]) or dictionaries in the file, train several on one stream and compare them.
    With several GPUs: torchrun --nproc-per-node 8 -m temposae train ..., each with a share of the text and of the latents.
    """
    from .engine.config import read_yaml
    from .engine.errors import UserError
    from .engine.folder import CONFIG, check_free, read_settings
    from .engine.ranks import Ranks
    from .engine.stream import ActivationStream
    from .engine.sweep import expand, resolve
    from .engine.train import train_together
    from .evals.run import evaluate_runs

    began = time.monotonic()
    check_writable(json_file)
    _check_backend()
    ranks = Ranks.start()
    given = {
        "stream": {
            "model": model,
            "hook": hook,
            "layer": layer,
            "data": data,
            "cache": None if cache is None else str(cache),
            "activations": None if activations is None else str(activations),
        },
        "sae": {"d_sae": d_sae, "k": k},
        "train": {"lr": lr, "tokens": tokens, "seed": seed},
    }
    if resume:
        if out is None or not (out / CONFIG).is_file():
            raise UserError(f"resume: --out must name a run folder; {out} holds no {CONFIG}")
        if config is not None or any(v is not None for part in given.values() for v in part.values()):
            raise UserError("resume: a run goes on with its own settings; give --out and --resume alone")
        settings = {name: run.model_dump() for name, run in read_settings(out).by_name().items()}
    else:
        settings = expand(_merge(read_yaml(config) if config else {}, given))
    first = next(iter(settings.values())).get("stream") or {}
    origin = Path(first.get("cache") or first.get("activations") or first.get("model", "testbed"))
    now = time.strftime("%Y%m%d-%H%M%S", time.localtime(ranks.largest(int(time.time()))))
    folder = out or Path("runs") / f"{origin.name}-{now}"
    if not resume:
        check_free(folder)
    lm, runs = resolve(settings)
    one = next(iter(runs.values()))
    most = max(run.train.tokens for run in runs.values())
    hooks = [] if lm is not None else list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.hooks))
    stream = ActivationStream(one.stream, tokens=most, seed=one.train.seed, model=lm, hooks=hooks, ranks=ranks)
    trained = train_together(stream, runs, out=folder, resume=resume)
    ranks.end()
    if not ranks.is_first:
        return
    stream.alone()
    try:
        summary = evaluate_runs(folder, trained, stream)
    except UserError as error:
        raise UserError(f"{error}; {folder} is trained, and temposae eval core --sae {folder} measures it") from None
    summary |= {"run": str(folder), "model": stream.name, "seconds": round(time.monotonic() - began, 1)}
    write_json(folder / "summary.json", summary)
    write_json(json_file, summary)
    _runs_table(summary)
    if stream.own is not None:
        print("CE recovered needs a language model; the other figures are of the activations alone")
    print(f"run folder: {folder}   figures: {folder / 'figures'}   {summary['seconds']:.0f} s")


@app.command()
def cache(
    config: Annotated[
        Path | None, typer.Argument(show_default=False, help="YAML with a section stream. Options win over it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to make.")] = ...,  # pyright: ignore[reportArgumentType]
    tokens: Annotated[int, typer.Option(help="Tokens to train on later: special ones don't count.")] = 1_000_000,
    model: Model = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="The residual stream after this layer; may be repeated. [the middle one]")
    ] = None,
    hook: Annotated[list[str] | None, typer.Option(help="This transformer_lens hook; may be repeated.")] = None,
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    shard_mb: Annotated[float, typer.Option(help="Size of a file, in 10^6 bytes.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the embedded language.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind the last whole shard; give the same settings again.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a model's activations, with their places, to disk once; `temposae train --cache` trains on them.

    Several hooks or layers are read in one pass. A text is read once and not begun again.
    """
    from .engine.config import StreamConfig, read_yaml
    from .engine.errors import UserError
    from .engine.stream.cache import write_cache

    began = time.monotonic()
    check_writable(json_file)
    settings = _merge(read_yaml(config) if config else {}, {"stream": {"model": model, "data": data}})["stream"]
    hooks, layers = list(hook or []), list(layer or [])
    if "layer" in settings and not hooks and not layers:
        layers = [settings["layer"]]
    if (layers and hooks) or ("layer" in settings and "hook" in settings):
        raise UserError("stream.hook: give hooks or layers, not both")
    left_out = {"layer"} | ({"hook"} if hooks or layers else set())
    stream = StreamConfig(**{key: value for key, value in settings.items() if key not in left_out})
    if stream.cache is not None:
        raise UserError(f"stream.cache: {stream.cache} is not allowed; a cache is made from a model")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype: {dtype} is not allowed; it must be bfloat16 or float32")
    manifest = write_cache(
        out, stream, tokens, hooks=hooks, layers=layers, seed=seed, dtype=dtype, shard_mb=shard_mb, resume=resume
    )
    found = {
        "cache": str(out), "model": manifest.stream.model, "hooks": list(manifest.hooks), "tokens": manifest.tokens,
        "shards": len(manifest.shards), "bytes": sum(shard.bytes for shard in manifest.shards),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_json(json_file, found)
    _figures(found)


@app.command("eval")
def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those above, or all.", show_default=False)],
    sae: Annotated[Path, typer.Option(help="A run folder or a checkpoint folder.")],
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the run folder holds already.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure a dictionary, beside its controls. Results of a run are kept in its folder's evals/.

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
    from .engine import checkpoint
    from .evals.run import evaluate
    from .evals.suite import EVALS, load_eval

    check_writable(json_file)
    _check_backend()
    names = list(EVALS) if name == "all" else [name]
    load_eval(names[0])
    found = checkpoint.find(sae)
    stream = _stream_of(found, model, layer, hook, data, tokens=100_000)
    is_run = sae != found.folder and all(option is None for option in (model, layer, hook, data))
    results = evaluate(found, stream, sae if is_run else None, names, seed=seed, sets=sets or (), fresh=fresh)
    write_json(json_file, results if name == "all" else results[name])
    for each, result in results.items():
        title = f"{each}: {found.folder} at {stream.model.hook} of {stream.model.name}"
        if "skipped" in result:
            print(f"{each}: skipped; {result['skipped']}")
        elif each == "core":
            _core_table(result, title)
        else:
            _scores_table(result, title)


@app.command()
def features(
    sae: Annotated[Path, typer.Option(help="A run folder or a checkpoint folder.")],
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
    from .engine import checkpoint
    from .evals import features as store

    began = time.monotonic()
    check_writable(json_file)
    _check_backend()
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


@testbed_app.command("train")
def testbed_train(
    out: Annotated[Path | None, typer.Option(help="Folder for model and tokenizer. [the package's own]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 16 documents.")] = 3000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: JsonFile = None,
) -> None:
    """Train the embedded language model from nothing (about 12 minutes on 2 cores; a GPU is used if there is one)."""
    from .engine.stream.model import TESTBED
    from .engine.testbed.training import train as train_model

    check_writable(json_file)
    quality = train_model(out or TESTBED, steps=steps, seed=seed)
    write_json(json_file, quality)
    _figures(quality)


@testbed_app.command("quality")
def testbed_quality(json_file: JsonFile = None) -> None:
    """Measure what the embedded language model knows: loss against the language's entropy, facts, order, agreement."""
    from .engine.stream.model import LanguageModel
    from .engine.testbed.language import HELD_OUT, Language
    from .engine.testbed.quality import measure

    check_writable(json_file)
    quality = measure(LanguageModel("testbed").bridge, Language(), HELD_OUT)
    write_json(json_file, quality)
    _figures(quality)


@testbed_app.command("sample")
def testbed_sample(
    count: Annotated[int, typer.Option(min=1, help="How many documents.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Number of the first one.")] = 0,
    correlation: Annotated[float, typer.Option(help="How strongly topic and tone go together, 0 to 1.")] = 0.5,
    json_file: JsonFile = None,
) -> None:
    """Print documents of the embedded language; --json adds every token's labels."""
    from .engine.testbed.language import Language

    check_writable(json_file)
    language = Language(correlation)
    documents = [language.document(start + i) for i in range(count)]
    for document in documents:
        print(document.text, end="\n\n")
    write_json(json_file, {"documents": [vars(document) | {"text": document.text} for document in documents]})


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Versions, GPU, Triton, and which backend would run here and why."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .kernels.backend import why

    check_writable(json_file)
    found: dict[str, Any] = {"temposae": version("temposae"), "python": platform.python_version()}
    for package in ("torch", "triton", "transformer-lens", "transformers", "datasets", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["gpu"] = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    found["threads"] = torch.get_num_threads()
    try:
        found["backend"], found["why"] = why()
    except ValueError as error:
        found["backend"], found["why"] = None, str(error)
    write_json(json_file, found)
    _figures(found)
    if found["backend"] is None:
        raise typer.Exit(2)


app.command()(profile)


def _merge(settings: dict[str, Any], given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings of a file, with the options that were given on top."""
    from .engine.errors import UserError

    merged = dict(settings)
    for section, options in given.items():
        base = merged.get(section) or {}
        if not isinstance(base, dict):
            raise UserError(f"{section}: {base!r} is not allowed; it must be a section of settings")
        merged[section] = base | {key: value for key, value in options.items() if value is not None}
    return merged


def _stream_of(
    found: "Checkpoint", model: str | None, layer: int | None, hook: str | None, data: str | None, *,
    tokens: int, **settings: Any,
) -> "ActivationStream":  # fmt: skip
    """The stream that a dictionary was trained on, with what the options and `settings` change of it."""
    from .engine.config import StreamConfig
    from .engine.errors import UserError
    from .engine.stream import ActivationStream, LanguageModel

    found.expect("sae")
    if found.run is not None and found.run.stream.activations is not None and model is None:
        raise UserError(
            f"model: {found.folder} was trained on {found.run.stream.activations}, without a model; give --model, and "
            "--hook or --layer"
        )
    if found.run is None and model is None:
        raise UserError(
            f"model: {found.folder} does not say what it was trained on; give --model, and --hook or --layer"
        )
    trained_on = found.run.stream if found.run is not None else StreamConfig()
    own_place: dict[str, Any] = {"hook": trained_on.hook} if model is None and layer is None else {}
    given: dict[str, Any] = {k: v for k, v in {"model": model, "hook": hook, "data": data}.items() if v is not None}
    config = StreamConfig(**(trained_on.model_dump(exclude={"hook"}) | own_place | given | settings))
    if any(option is not None for option in (model, layer, hook, data)):
        config = config.model_copy(update={"cache": None})  # another model, place or text than it holds
    lm = LanguageModel(config.model, hook=config.hook, layer=layer)
    if config.target is not None:
        lm.use(hooks=[lm.hook, lm.place(config.target)])
    seed = found.run.train.seed if found.run is not None else 0
    return ActivationStream(config, tokens=tokens, seed=seed, model=lm)


def _check_backend() -> None:
    """A wrong TEMPOSAE_BACKEND, or one that can't run here, is said before anything is loaded."""
    from .engine.errors import UserError
    from .kernels.backend import why

    try:
        why()
    except ValueError as error:
        raise UserError(str(error)) from None


def _core_table(result: dict[str, Any], title: str) -> None:
    """The scores of a dictionary, and of its controls."""
    _table({"dictionary": result} | {f"{name} control": scores for name, scores in result["controls"].items()}, title)


def _scores_table(result: dict[str, Any], title: str) -> None:
    """Every score of an eval, and of each of its parts, a line each, with a column for each control that has it."""
    from rich.console import Console
    from rich.table import Table

    parts = {"": result} | {
        k: v for k, v in result.items() if isinstance(v, dict) and isinstance(v.get("controls"), dict)
    }
    names = list(dict.fromkeys(name for part in parts.values() for name in part.get("controls", {})))
    table = Table(title=title, title_justify="left")
    for heading in ("", "dictionary", *names):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for part, scores in parts.items():
        for key, value in scores.items():
            if isinstance(value, float) and key != "seconds":
                others = (scores.get("controls", {}).get(name, {}).get(key) for name in names)
                cells = (f"{x:.4f}" if isinstance(x, float) else "-" for x in (value, *others))
                table.add_row(f"{part} {key}".replace("_", " ").strip(), *cells)
    Console().print(table)
    for warning in result.get("warnings", []):
        print(f"warning: {warning}")
    if reached := result.get("reached_by"):
        print(f"a control does as well: {', '.join(reached)}")


def _runs_table(summary: dict[str, Any]) -> None:
    """What `train` leaves behind: a dictionary beside its controls, or several, each beside its random control."""
    several = summary.get("dictionaries")
    if several is None:
        _core_table(
            summary, f"{summary['activation']}, F = {summary['d_sae']}, at {summary['hook']} of {summary['model']}"
        )
        return
    whole = {name: scores for name, scores in several.items() if "failed" not in scores}
    controls = {name: scores["controls"].get("random", {}).get("explained_variance") for name, scores in whole.items()}
    _table(whole, f"{len(several)} dictionaries of {summary['model']}", {"random EV": controls})
    for name, scores in several.items():
        if "failed" in scores:
            print(f"{name} was stopped: {scores['failed']}")


def _table(
    lines: dict[str, dict[str, Any]], title: str, more: dict[str, dict[str, float | None]] | None = None
) -> None:
    """Core scores, a line each, with further columns `more`: heading -> line -> value."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    names = ("explained variance", "CE recovered", "over mean") if more is None else ("EV", "CE", "over mean")
    more = more or {}
    table = Table(title=title, title_justify="left")
    for heading in ("", *names, "L0", "dead", *more):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, scores in lines.items():
        keys = ("explained_variance", "ce_recovered", "ce_recovered_over_mean")
        dead = "-" if name == "mean control" else f"{scores['dead_fraction']:.1%}"
        others = (number(column[name]) for column in more.values())
        table.add_row(name, *(number(scores[key]) for key in keys), f"{scores['l0']:.1f}", dead, *others)
    Console().print(table)


def _figures(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:{width}}  {value if not isinstance(value, float) else format(value, '.4f')}")
