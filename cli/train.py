"""`temposae train` and `temposae cache`."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ..engine.errors import UserError
from ..engine.process.signals import stop_advice
from ..engine.storage.files import write_json
from ..engine.storage.lock import owned
from .options import Data, Field, Hook, JsonFile, Layer, Model, Plugin, Resume, Split, Subset, check_backend, merge
from .output import figures, recovery_table, runs_table

if TYPE_CHECKING:
    from ..engine.ranks import Ranks


def train(
    config: Annotated[
        Path | None,
        Argument(
            show_default=False,
            help="YAML file with sections stream, sae, train and eval, and sweep or dictionaries for several dictionaries. "
            "Options override it.",
        ),
    ] = None,
    model: Model = None,
    layer: Layer = None,
    hook: Hook = None,
    data: Data = None,
    text_field: Field = None,
    split: Split = None,
    subset: Subset = None,
    cache: Annotated[Path | None, Option(help="Train on a cache: a folder made by `temposae cache`.")] = None,
    activations: Annotated[
        Path | None, Option(help="Train on a .npy, .safetensors or .pt file of activations.")
    ] = None,
    activation: Annotated[str | None, Option(help="topk, batchtopk, relu or jumprelu. [default: topk]")] = None,
    d_sae: Annotated[int | None, Option(help="F, the number of latents. [default: 8 times the model's width]")] = None,
    k: Annotated[int | None, Option(help="Latents kept per token. [default: 32]")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate. [default: by D, F, batch and steps]")] = None,
    tokens: Annotated[int | None, Option(help="Number of tokens to train on. [default: 1000000]")] = None,
    seed: Annotated[int | None, Option(help="Seed of weights, text order and mixing. [default: 0]")] = None,
    eval_rows: Annotated[
        int | None,
        Option(
            min=1,
            max=2**20,
            help="Rows of held-out text to evaluate on. [default: 32 to 256, by the model's cost]",
        ),
    ] = None,
    no_eval: Annotated[bool, Option("--no-eval", help="Skip evaluation; `temposae eval` can do it later.")] = False,
    out: Annotated[Path | None, Option(help="Run folder to create. [default: runs/MODEL-DATE-TIME]")] = None,
    resume: Resume = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Train a dictionary and its random control, and evaluate both.

    A section sweep (k: [16, 32]) or dictionaries in the file trains several dictionaries on one stream and compares them.
    To use several GPUs: torchrun --nproc-per-node 8 -m temposae train ... Each takes a share of the text and the latents.
    """
    from ..engine.config import read_yaml
    from ..engine.ranks import Ranks
    from ..engine.sweep import expand

    check_backend()
    ranks = Ranks.start()
    stream = {"model": model, "hook": hook, "layer": layer, "data": data, "text_field": text_field, "split": split}
    stream |= {"subset": subset, "cache": cache and str(cache), "activations": activations and str(activations)}
    options = {
        "stream": stream,
        "sae": {"activation": activation, "d_sae": d_sae, "k": k},
        "train": {"lr": lr, "tokens": tokens, "seed": seed},
        "eval": {"rows": eval_rows, "after_training": False if no_eval else None},
    }
    if resume:
        settings = settings_to_resume(out, config, options)
    else:
        settings = expand(merge(read_yaml(config) if config else {}, options))
    start(settings, out, resume, ranks, json_file)


def settings_to_resume(out: Path | None, config: Path | None, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of the run in `out`. Raises UserError if there is none, or if other settings are given."""
    from ..engine.storage.run_folder import CONFIG, read_settings

    if out is None:
        raise UserError("resume: give --out FOLDER, the folder of the run to continue")
    if not (out / CONFIG).is_file():
        raise UserError(f"resume: --out must name a run folder; {out} has no {CONFIG}")
    if config is not None or any(v is not None for section in options.values() for v in section.values()):
        raise UserError("resume: a run keeps its own settings; give only --out, --resume and --plugin")
    return {name: run.model_dump() for name, run in read_settings(out).by_name().items()}


def start(settings: dict[str, Any], out: Path | None, resume: bool, ranks: "Ranks", json_file: Path | None) -> None:
    """Train and evaluate the dictionaries of `settings`, as from `expand`, in the folder `out` or a new one."""
    from ..engine.storage.run_folder import check_free
    from ..engine.sweep import read_streams

    streams, _ = read_streams(settings)
    first = next(iter(streams.values()))
    origin = Path("world" if first.world else first.cache or first.activations or first.model)
    now = time.strftime("%Y%m%d-%H%M%S", time.localtime(ranks.largest(int(time.time()))))
    folder = out or Path("runs") / f"{origin.name}-{now}"
    with owned(folder) if ranks.is_first else nullcontext():
        if not resume:
            check_free(folder)
        _train(settings, folder, resume, ranks, json_file)


def _train(settings: dict[str, Any], folder: Path, resume: bool, ranks: "Ranks", json_file: Path | None) -> None:
    from ..engine.process.cpu_memory import peak_gb
    from ..engine.stream import ActivationStream
    from ..engine.sweep import resolve
    from ..engine.train import train_together
    from ..evals.run_evals import evaluate_runs

    began = time.monotonic()
    lm, runs = resolve(settings)
    first = next(iter(runs.values()))
    tokens = max(run.train.tokens for run in runs.values())
    hooks = list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.read_hooks)) if lm is None else []
    batch, seed = first.train.batch, first.train.seed
    stream = ActivationStream(first.stream, tokens=tokens, batch=batch, seed=seed, model=lm, hooks=hooks, ranks=ranks)
    trained = train_together(stream, runs, out=folder, resume=resume)
    ranks.end()
    if not ranks.is_first:
        return
    stream.alone()
    with stop_advice(
        f"stopped while evaluating; {folder} is trained, and temposae eval core --sae {folder} evaluates it"
    ):
        summary = evaluate_runs(folder, trained, stream)
    summary |= {"run": str(folder), "model": stream.name, "massive": stream.norms.report()}
    summary |= {"seconds": round(time.monotonic() - began, 1), "peak_gb": peak_gb()}
    write_json(folder / "summary.json", summary)
    write_json(json_file, summary)
    runs_table(summary)
    recovery_table(summary)
    if stream.own is not None:
        print("CE recovered was not measured: it needs a language model")
    failed = _print_not_measured(summary, folder)
    times = f"{summary['seconds']:.0f} s   peak memory: {summary['peak_gb']:.1f} GB"
    print(f"run folder: {folder}   figures: {folder / 'figures'}   {times}")
    if failed:
        raise typer.Exit(2)


def _print_not_measured(summary: dict[str, Any], folder: Path) -> bool:
    """Name each dictionary that was not evaluated, and how to do it. Returns whether an evaluation failed."""
    failed = False
    for name, scores in (summary.get("dictionaries") or {"": summary}).items():
        reason, place = scores.get("not_measured"), folder / name
        advice = f"temposae eval core --sae {place} evaluates it"
        if reason is not None and "no-eval" in reason:
            label = f"{name}: " if name else ""
            print(f"{label}not evaluated (--no-eval), scores are those of the last training steps; {advice}")
        elif reason is not None:
            failed = True
            print(f"error: {reason}; {place} is trained, and {advice}", file=sys.stderr)
    return failed


def cache(
    config: Annotated[
        Path | None, Argument(show_default=False, help="YAML file with section stream. Options override it.")
    ] = None,
    out: Annotated[Path, Option(help="Folder to create.")] = ...,  # pyright: ignore[reportArgumentType]
    tokens: Annotated[int, Option(min=1, max=10**15, help="Tokens to store, without special tokens.")] = 1_000_000,
    model: Model = None,
    layer: Annotated[
        list[int] | None, Option(help="Layer of the residual stream, from 0. Repeatable. [default: the middle layer]")
    ] = None,
    hook: Annotated[list[str] | None, Option(help="transformer_lens hook to store instead. Repeatable.")] = None,
    data: Data = None,
    text_field: Field = None,
    split: Split = None,
    subset: Subset = None,
    dtype: Annotated[str, Option(help="Stored type of activations: bfloat16 or float32.")] = "bfloat16",
    shard_mb: Annotated[float, Option(min=1e-3, max=1e6, help="Size of one file, in MB (10^6 bytes).")] = 256,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="Seed of the embedded language's documents.")] = 0,
    resume: Annotated[
        bool, Option("--resume", help="Continue after the last complete shard, with the same settings.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Store a model's activations on disk for later training.

    `temposae train --cache` reads them. Each activation is stored with its position, token and document. Several hooks or
    layers are read in one pass. The text is read once and not repeated.
    """
    from ..engine.config import Layer, StreamConfig, read_yaml
    from ..engine.stream.cache_writer import write_cache

    began = time.monotonic()
    options = {"model": model, "data": data, "text_field": text_field, "split": split, "subset": subset}
    config_settings = merge(read_yaml(config) if config else {}, {"stream": options})
    for other in config_settings.keys() - {"stream", "sae", "train", "eval"}:
        raise UserError(f"{other}: no such section; a cache has the section stream")
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
        raise UserError(f"stream.cache: {stream.cache} is not allowed; give a model, not another cache")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype: {dtype} is not allowed; it must be bfloat16 or float32")
    with stop_advice(f"stopped; the same command with --resume continues after the last complete shard of {out}"):
        manifest = write_cache(
            out, stream, tokens, hooks=hooks or layers, seed=seed, dtype=dtype, shard_mb=shard_mb, resume=resume
        )
    summary = {
        "cache": str(out), "model": manifest.stream.model, "hooks": list(manifest.hooks), "tokens": manifest.tokens,
        "shards": len(manifest.shards), "bytes": sum(shard.bytes for shard in manifest.shards),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_json(json_file, summary)
    figures(summary)
