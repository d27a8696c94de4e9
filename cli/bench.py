"""`temposae bench ...` and `temposae profile`: measure speed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..engine.errors import UserError, check_known
from ..engine.storage.files import check_writable, write_json
from .arguments import App
from .options import PLAIN, GrowingJsonFile, JsonFile, check_backend

bench_app = App(help="Time training steps, ops and streams, next to other libraries.", **PLAIN)

Preset = Annotated[str | None, Option(help="Shapes: tiny, cpu, gpu or sweep. [default: gpu or cpu, by device]")]
Sources = Annotated[
    list[str] | None,
    Option(
        help="Activations to train on: synthetic:WIDTH, world:SEED, MODEL:LAYER or NAME=FILE.npy. Repeatable. "
        "[default: the preset's]"
    ),
]
Cells = Annotated[
    list[str] | None,
    Option(help="ACTIVATION,F,K,BATCH,STEPS, as in topk,512,16,256,100. Repeatable. [default: the preset's]"),
]
SourceText = Annotated[str | None, Option(help="Text for MODEL:LAYER, as in `train --data`.")]
N = Annotated[str | None, Option("--n", help="Tokens per batch, as in 8192 or 1024,8192. [default: the preset's]")]
D = Annotated[str | None, Option("--d", help="Width of the activations, as --n. [default: the preset's]")]
F = Annotated[str | None, Option("--f", help="Number of latents, as --n. [default: the preset's]")]
K = Annotated[str | None, Option("--k", help="Latents kept per token, as --n. [default: the preset's]")]
Dtype = Annotated[str | None, Option(help="Type of matrix products: fp32 or bf16. [default: bf16 on a GPU, else fp32]")]
Device = Annotated[str | None, Option(help="cpu or cuda. [default: cuda if there is a GPU]")]


@bench_app.command()
def step(
    preset: Preset = None,
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    provider: Annotated[list[str] | None, Option(help="temposae, SAELens, ... Repeatable. [default: all]")] = None,
    activation: Annotated[
        list[str] | None, Option(help="topk, batchtopk, jumprelu, relu. Repeatable. [default: topk]")
    ] = None,
    auxk: Annotated[bool, Option("--auxk", help="Use AuxK, with a quarter of the latents dead.")] = False,
    dictionaries: Annotated[int, Option(min=1, max=1000, help="Number of dictionaries on the same tokens.")] = 1,
    own: Annotated[bool, Option("--own", help="Also time each library with its own defaults.")] = False,
    rounds: Annotated[int, Option(min=1, max=10_000, help="Samples of each provider.")] = 20,
    clip: Annotated[
        float | None, Option(min=1e-6, max=1e9, help="Clip gradients to this norm, where optional. [default: no]")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time a whole training step of every library on the same tokens.

    A step is forward, backward and Adam. By default all use fused Adam at one constant learning rate. Providers take turns,
    medians are compared, and the table says whether each one learns. Libraries that are not installed or lack the
    activation are left out.
    """
    device_type, dtype_name, shapes = _start(device, dtype, preset, (n, d, f, k))
    from ..bench import step as steps
    from ..bench.providers import PROVIDERS
    from ..bench.results import record, table

    measured = steps.measure(
        shapes,
        steps.contenders(provider or PROVIDERS, own),
        device=device_type,
        dtype=dtype_name,
        rounds=rounds,
        clip=clip,
        activations=activation or ["topk"],
        auxk=auxk,
        dictionaries=dictionaries,
    )
    _finish(record(*measured, device_type), table, json_file)


@bench_app.command()
def ops(
    preset: Preset = None,
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    op: Annotated[list[str] | None, Option(help="encode, decode, ... Repeatable. [default: all]")] = None,
    repeats: Annotated[int, Option(min=1, max=10_000, help="Samples of each op.")] = 20,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16. [default: bf16 on a GPU, else fp32]")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time each op, with its FLOPs, its bytes and its floor.

    The floor is the least time that FLOPs and bytes allow on this device.
    """
    device_type, dtype_name, shapes = _start(device, dtype, preset, (n, d, f, k))
    from ..bench import ops as suite
    from ..bench.results import record, table

    measured = suite.measure(
        shapes,
        op or suite.OPS,
        device=device_type,
        dtype=dtype_name,
        repeats=repeats,
        keep=lambda cases, left_out: write_json(json_file, record(cases, left_out, device_type)),
    )
    print(table(record(*measured, device_type)), end="")


@bench_app.command()
def streams(
    preset: Annotated[str | None, Option(help="Sizes: tiny, cpu or gpu. [default: gpu or cpu, by device]")] = None,
    model: Annotated[str | None, Option(help="Language model, at its middle layer. [default: the preset's]")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time harvesting, the buffer and training against the model.

    Results are ratios of times taken in turns: harvesting, the ring buffer, and training 1, 8 and 32 dictionaries. On a GPU
    the language model has Gemma-2-2B's shape and random weights.
    """
    device_type = _check(device)
    from ..bench import streams as suite

    sizes = suite.sizes(preset or _default_preset(device_type), model)
    _finish(suite.measure(sizes, device=device_type), suite.table, json_file)


@bench_app.command()
def runs(
    preset: Annotated[str | None, Option(help="Sizes: tiny, cpu, testbed or gpu. [default: gpu or cpu]")] = None,
    only: Annotated[str | None, Option("--runs", help="Runs by commas, as in A1,C2,E4. [default: all]")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time a step of every documented run against a plain TopK step.

    Also times training all of them on one stream against training them one by one.
    """
    device_type = _check(device)
    from ..bench import documented_runs as suite
    from ..campaign.documented import documented

    preset_name = preset or _default_preset(device_type)
    check_known("preset", preset_name, suite.PRESETS)
    chosen = suite.TRAINED if only is None else [documented(name).trained_as or name for name in only.split(",")]
    results = suite.measure(suite.PRESETS[preset_name], tuple(dict.fromkeys(chosen)), device=device_type)
    _finish(results, suite.table, json_file)


@bench_app.command("lr")
def learning_rate(
    preset: Annotated[
        str, Option(help="Sources and cells: tiny, cpu (synthetic and testbed) or pretrained (smollm2, with --data).")
    ] = "cpu",
    source: Sources = None,
    cell: Cells = None,
    data: SourceText = None,
    seeds: Annotated[int, Option(min=1, max=1000, help="Number of seeds to average over.")] = 1,
    json_file: GrowingJsonFile = None,
) -> None:
    """Compare the default learning rate with a grid of others.

    Trains a dictionary at each rate and compares FVU on held-out tokens. Runs on the CPU and takes minutes to hours,
    depending on the preset.
    """
    _check("cpu")
    from ..bench import learning_rate as suite
    from ..engine.stream.documents import check_data

    if data is not None:
        check_data(data)
    results = suite.measure(
        suite.plan(preset, source, cell),
        data=data,
        seeds=seeds,
        done=suite.read(json_file),
        keep=lambda results: write_json(json_file, results),
    )
    print(suite.table(results), end="")


@bench_app.command()
def quality(
    preset: Annotated[
        str, Option(help="Sources and cells: tiny, cpu (a synthetic world) or pretrained (smollm2, with --data).")
    ] = "cpu",
    source: Sources = None,
    cell: Cells = None,
    library: Annotated[
        list[str] | None,
        Option(help="temposae, SAELens, dictionary_learning, eai-sparsify. Repeatable. [default: all]"),
    ] = None,
    lr: Annotated[
        list[float] | None, Option(min=1e-8, max=1.0, help="Learning rate. Repeatable. [default: the preset's]")
    ] = None,
    data: SourceText = None,
    seeds: Annotated[int, Option(min=1, max=1000, help="Number of seeds, from 0.")] = 3,
    json_file: GrowingJsonFile = None,
) -> None:
    """Compare what libraries' training reaches.

    All use their own training code, on the same batches, at their best of a few constant learning rates. Prints FVU on
    held-out activations, dead latents, seconds and, on a synthetic world, F1 and MCC. Runs on the CPU and takes minutes to
    hours, depending on the preset.
    """
    _check("cpu")
    from ..bench import learning_rate
    from ..bench import quality as suite
    from ..engine.stream.documents import check_data

    if data is not None:
        check_data(data)
    sources = learning_rate.plan(preset, source, cell, suite.PRESETS)
    results = suite.measure(
        sources,
        libraries=library or suite.LIBRARIES,
        rates=sorted(set(lr)) if lr else suite.RATES[preset],
        seeds=seeds,
        data=data,
        done=suite.read(json_file),
        keep=lambda results: write_json(json_file, results),
    )
    print(suite.table(results), end="")


@bench_app.command()
def peers(
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    library: Annotated[
        list[str] | None, Option(help="saelens, dictionary_learning, sparsify. Repeatable. [default: all]")
    ] = None,
    steps: Annotated[int, Option(min=5, max=10_000, help="Training steps per run. Their median counts.")] = 30,
    rounds: Annotated[int, Option(min=1, max=1000, help="Runs of each script.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Time other libraries' scripts before and after `accelerate`.

    The scripts are minimal training scripts in bench/peers, with diffs that add two lines. The preset is N = 1024, D = 512,
    F = 4096,16384, K = 32. On a GPU it is N = 4096, D = 2304, F = 65536, K = 64, under bfloat16 autocast.
    """
    device_type = _check()
    from ..bench import before_after as suite

    default_sizes = {"cpu": ("1024", "512", "4096,16384", "32"), "cuda": ("4096", "2304", "65536", "64")}[device_type]
    shapes = _shapes("cpu", *(size or default for size, default in zip((n, d, f, k), default_sizes, strict=True)))
    results = suite.measure(shapes, library or list(suite.LIBRARIES), device=device_type, steps=steps, rounds=rounds)
    _finish(results, suite.table, json_file)


@bench_app.command()
def table(
    files: Annotated[list[Path], Argument(help="JSON files of `bench step --json` or `ops --json`.")],
) -> None:
    """Print saved results as Markdown."""
    from ..bench.results import read
    from ..bench.results import table as markdown

    print("\n".join(markdown(read(path)) for path in files), end="")


@bench_app.command()
def report(
    out: Annotated[Path, Option(help="Folder for report.md, report.json and the figures.")] = Path("bench-report"),
    results: Annotated[list[Path] | None, Option(help="Saved results. Repeatable. [default: the package's]")] = None,
    arch: Annotated[
        list[int] | None, Option(min=70, max=200, help="GPU architecture. Repeatable. [default: the GPUs']")
    ] = None,
    kernel: Annotated[list[str] | None, Option(help="Kernel to compile. Repeatable. [default: all]")] = None,
    gpu: Annotated[
        list[str] | None, Option(help="GPU to predict the step for: A100, H100, H200, B200. Repeatable. [default: all]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Predict the step's time, and report results against floors.

    Compiles all kernels. Needs no GPU. On a machine with a GPU, the ops and temposae's step are measured first, unless
    --results is given.
    """
    _set_log_levels()
    from ..bench.report import write as write_report

    figures, paths = write_report(out, results=results, archs=arch, kernels=kernel, gpus=gpu)
    write_json(json_file, figures)
    print((out / "report.md").read_text(), end="")
    print("\nwritten: " + "  ".join(map(str, paths)))


@bench_app.command()
def tune(
    entry: Annotated[list[str] | None, Option(help="Entry: encode, merge, ... Repeatable. [default: all]")] = None,
    json_file: JsonFile = None,
) -> None:
    """Choose launch settings for this GPU and save them.

    Times a small grid of settings at N = 8192, D = 2304, F = 65536, K = 64, mostly in bf16, and writes the best ones to this
    GPU's row of kernels/configs.py. Takes minutes. Run the GPU tests afterwards.
    """
    _set_log_levels()
    from ..bench import tune as tuning

    choices = tuning.run(entry)
    write_json(json_file, [choice._asdict() for choice in choices])
    print(tuning.summary(choices), end="")
    print(f"written: {tuning.FILE}")


def profile(
    preset: Preset = None,
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    steps: Annotated[int, Option(min=1, max=10_000, help="Number of steps to profile.")] = 5,
    trace: Annotated[Path, Option(help="Chrome trace to write. Open it in ui.perfetto.dev.")] = Path("trace.json"),
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Show where the time of a training step goes.

    Prints the stages of a step and writes a trace of it. Profiles one shape: the first of the preset, or the given one.
    """
    device_type, dtype_name, shapes = _start(device, dtype, preset, (n, d, f, k))
    from ..bench.profile import run
    from ..bench.profile import table as stages
    from ..bench.results import commit, device_name

    if len(shapes) > 1 and (n, d, f, k) != (None,) * 4:
        raise UserError(f"--n, --d, --f, --k: {len(shapes)} shapes are not allowed; give one number each")
    check_writable(trace, "trace")
    timings = run(shapes[0], device=device_type, dtype=dtype_name, steps=steps, trace=trace)
    timings |= {"device": device_name(device_type), "commit": commit(), "trace": str(trace)}
    _finish(timings, stages, json_file)
    print(f"trace: {trace}")


def _start(
    device: str | None, dtype: str | None, preset: str | None, sizes: tuple[str | None, ...]
) -> tuple[str, str, Any]:
    """Check the options and return device, dtype and shapes. `sizes` are N, D, F and K."""
    device_type = _check(device)
    from ..bench.data import DTYPES, check_settings

    default_dtype = "bf16" if device_type == "cuda" else "fp32"
    dtype_name = default_dtype if dtype is None else dtype
    check_settings(dtype_name, DTYPES)
    return device_type, dtype_name, _shapes(preset or _default_preset(device_type), *sizes)


def _check(device: str | None = None) -> str:
    """Check that a backend runs on the device. Returns "cpu" or "cuda"."""
    _set_log_levels()
    import torch

    if device is not None:
        check_known("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' is not allowed; torch finds no GPU here")
    check_backend()
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _default_preset(device_type: str) -> str:
    return "gpu" if device_type == "cuda" else "cpu"


def _shapes(preset: str, n: str | None, d: str | None, f: str | None, k: str | None) -> Any:
    """The shapes that the options ask for. An error names the option."""
    from ..bench.data import shapes

    try:
        return shapes(preset, N=n, D=d, F=f, K=k)
    except UserError as error:
        field, colon, rest = str(error).partition(": ")
        raise UserError(f"--{field.lower()}{colon}{rest}" if field in ("N", "D", "F", "K") else error) from None


def _finish(results: dict[str, Any], as_markdown: Callable[[dict[str, Any]], str], json_file: Path | None) -> None:
    write_json(json_file, results)
    print(as_markdown(results), end="")


def _set_log_levels() -> None:
    """Silence the profiler's messages about its stages. torch reads the variables when it is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
