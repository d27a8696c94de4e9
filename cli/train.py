"""`temposae train` and `temposae cache`."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine.storage.files import check_writable, write_json
from .options import Data, Field, Hook, JsonFile, Layer, Model, Plugin, Split, Subset, check_backend, merge
from .output import figures, runs_table

if TYPE_CHECKING:
    from ..engine.ranks import Ranks


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            show_default=False,
            help="YAML with sections stream, sae, train, eval; with sweep or dictionaries for several on one stream. "
            "Options win over it.",
        ),
    ] = None,
    model: Model = None,
    layer: Layer = None,
    hook: Hook = None,
    data: Data = None,
    text_field: Field = None,
    split: Split = None,
    subset: Subset = None,
    cache: Annotated[
        Path | None, typer.Option(help="Read activations from this folder, which `temposae cache` made.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(help="Train on the activations in this .npy, .safetensors or .pt file, without a model."),
    ] = None,
    activation: Annotated[str | None, typer.Option(help="topk, batchtopk, relu or jumprelu. [topk]")] = None,
    d_sae: Annotated[int | None, typer.Option(help="F, the number of latents. [8 times the model's width]")] = None,
    k: Annotated[int | None, typer.Option(help="Latents kept per token. [32]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [by D, F, batch and steps]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. [1000000]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, text order and mixing. [0]")] = None,
    eval_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**20,
            help="Measure on so many rows of held-out text. [as cost a fifth of the model's passes, 32 to 256]",
        ),
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Train only; `temposae eval` measures later.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder to make. [runs/MODEL-DATE-TIME]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the stopped run in --out, with its settings.")
    ] = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Train a dictionary, with its random control beside it; measure both; draw the figures.

    With a section sweep (k: [16, 32]) or dictionaries in the file, train several on one stream and compare them.
    With several GPUs: torchrun --nproc-per-node 8 -m temposae train ..., each with a share of the text and of the latents.
    """
    from ..engine.config import read_yaml
    from ..engine.errors import UserError
    from ..engine.plugins import use
    from ..engine.ranks import Ranks
    from ..engine.storage.lock import owned
    from ..engine.storage.run_folder import CONFIG, check_free, read_settings
    from ..engine.sweep import expand, read_streams

    check_writable(json_file)
    check_backend()
    use(plugin)
    ranks = Ranks.start()
    options = {
        "stream": {
            "model": model,
            "hook": hook,
            "layer": layer,
            "data": data,
            "text_field": text_field,
            "split": split,
            "subset": subset,
            "cache": None if cache is None else str(cache),
            "activations": None if activations is None else str(activations),
        },
        "sae": {"activation": activation, "d_sae": d_sae, "k": k},
        "train": {"lr": lr, "tokens": tokens, "seed": seed},
        "eval": {"rows": eval_rows, "after_training": False if no_eval else None},
    }
    if resume:
        if out is None:
            raise UserError("resume: give --out FOLDER, the folder of the run to go on with")
        if not (out / CONFIG).is_file():
            raise UserError(f"resume: --out must name a run folder; {out} holds no {CONFIG}")
        if config is not None or any(v is not None for section in options.values() for v in section.values()):
            raise UserError("resume: a run goes on with its own settings; give --out and --resume alone (and --plugin)")
        settings = {name: run.model_dump() for name, run in read_settings(out).by_name().items()}
    else:
        settings = expand(merge(read_yaml(config) if config else {}, options))
    streams, _ = read_streams(settings)
    first = next(iter(streams.values()))
    origin = Path(first.cache or first.activations or first.model)
    now = time.strftime("%Y%m%d-%H%M%S", time.localtime(ranks.largest(int(time.time()))))
    folder = out or Path("runs") / f"{origin.name}-{now}"
    with owned(folder) if ranks.is_first else nullcontext():
        if not resume:
            check_free(folder)
        _train(settings, folder, resume, ranks, json_file)


def _train(
    settings: dict[str, dict[str, Any]], folder: Path, resume: bool, ranks: "Ranks", json_file: Path | None
) -> None:
    """Train the dictionaries of these settings into a folder, measure them, and say how they do."""
    from ..engine.process.cpu_memory import peak_gb
    from ..engine.process.signals import stop_advice
    from ..engine.stream import ActivationStream
    from ..engine.sweep import resolve
    from ..engine.train import train_together
    from ..evals.run_evals import evaluate_runs

    began = time.monotonic()
    lm, runs = resolve(settings)
    first = next(iter(runs.values()))
    max_tokens = max(run.train.tokens for run in runs.values())
    hooks = (
        [] if lm is not None else list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.read_hooks))
    )
    stream = ActivationStream(
        first.stream,
        tokens=max_tokens,
        batch=first.train.batch,
        seed=first.train.seed,
        model=lm,
        hooks=hooks,
        ranks=ranks,
    )
    trained = train_together(stream, runs, out=folder, resume=resume)
    ranks.end()
    if not ranks.is_first:
        return
    stream.alone()
    measure = f"temposae eval core --sae {folder}"
    with stop_advice(f"stopped while measuring; {folder} is trained, and {measure} measures it"):
        summary = evaluate_runs(folder, trained, stream)
    summary |= {"run": str(folder), "model": stream.name, "massive": stream.norms.report()}
    summary |= {"seconds": round(time.monotonic() - began, 1), "peak_gb": peak_gb()}
    write_json(folder / "summary.json", summary)
    write_json(json_file, summary)
    runs_table(summary)
    if stream.own is not None:
        print("CE recovered needs a language model; the other figures are of the activations alone")
    failed = _say_not_measured(summary, folder)
    peak = "" if summary["peak_gb"] is None else f"   {summary['peak_gb']:.1f} GB of memory at most"
    print(f"run folder: {folder}   figures: {folder / 'figures'}   {summary['seconds']:.0f} s{peak}")
    if failed:
        raise typer.Exit(2)


def _say_not_measured(summary: dict[str, Any], folder: Path) -> bool:
    """A line for each dictionary that isn't measured, with the command that measures it; whether any failed to be."""
    failed = False
    for name, scores in (summary.get("dictionaries") or {"": summary}).items():
        if (reason := scores.get("not_measured")) is None:
            continue
        command = f"temposae eval core --sae {folder / name}"
        if "no-eval" in reason:
            print(
                f"{f'{name}: ' if name else ''}not measured (--no-eval), figures are training's; {command} measures it"
            )
        else:
            failed = True
            place = folder / name
            print(f"error: {reason}; {place} is trained, and {command} measures it", file=sys.stderr)
    return failed


def cache(
    config: Annotated[
        Path | None, typer.Argument(show_default=False, help="YAML with a section stream. Options win over it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to make.")] = ...,  # pyright: ignore[reportArgumentType]
    tokens: Annotated[
        int, typer.Option(min=1, max=10**15, help="Tokens to train on later: special ones don't count.")
    ] = 1_000_000,
    model: Model = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="The residual stream after this layer; may be repeated. [the middle one]")
    ] = None,
    hook: Annotated[list[str] | None, typer.Option(help="This transformer_lens hook; may be repeated.")] = None,
    data: Data = None,
    text_field: Field = None,
    split: Split = None,
    subset: Subset = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    shard_mb: Annotated[float, typer.Option(min=1e-3, max=1e6, help="Size of a file, in 10^6 bytes.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the embedded language.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind the last whole shard; give the same settings again.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Write a model's activations, with their places, to disk once; `temposae train --cache` trains on them.

    Several hooks or layers are read in one pass. A text is read once and not begun again.
    """
    from ..engine.config import Layer, StreamConfig, read_yaml
    from ..engine.errors import UserError
    from ..engine.process.signals import stop_advice
    from ..engine.stream.cache_writer import write_cache

    began = time.monotonic()
    check_writable(json_file)
    options = {"model": model, "data": data, "text_field": text_field, "split": split, "subset": subset}
    config_settings = merge(read_yaml(config) if config else {}, {"stream": options})
    for other in config_settings.keys() - {"stream", "sae", "train", "eval"}:
        raise UserError(f"{other}: no such section; a cache takes its settings from stream")
    settings = config_settings["stream"]
    hooks, layers = list(hook or []), list(layer or [])
    layer_setting = Layer(layer=settings.get("layer")).layer
    if layer_setting is not None and not hooks and not layers:
        layers = [layer_setting]
    if (layers and hooks) or (layer_setting is not None and settings.get("hook") is not None):
        raise UserError("stream.hook: give hooks or layers, not both")
    left_out = {"layer"} | ({"hook"} if hooks or layers else set())
    stream = StreamConfig(**{key: value for key, value in settings.items() if key not in left_out})
    if stream.cache is not None:
        raise UserError(f"stream.cache: {stream.cache} is not allowed; a cache is made from a model")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype: {dtype} is not allowed; it must be bfloat16 or float32")
    with stop_advice(f"stopped; the same command with --resume goes on behind the last whole shard of {out}"):
        manifest = write_cache(
            out, stream, tokens, hooks=hooks, layers=layers, seed=seed, dtype=dtype, shard_mb=shard_mb, resume=resume
        )
    summary = {
        "cache": str(out), "model": manifest.stream.model, "hooks": list(manifest.hooks), "tokens": manifest.tokens,
        "shards": len(manifest.shards), "bytes": sum(shard.bytes for shard in manifest.shards),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_json(json_file, summary)
    figures(summary)
