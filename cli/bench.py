"""Commands of the bench suite: `temposae bench ...` and `temposae profile`. Heavy imports wait until a command runs."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.storage.files import check_writable, write_json
from .arguments import App
from .options import PLAIN, JsonFile

bench_app = App(
    help="Time ops and training steps beside other libraries and beside what the device could do.",
    **PLAIN,
)

Preset = Annotated[str | None, typer.Option(help="tiny, cpu, gpu or sweep: shapes to measure. [gpu or cpu, by device]")]
N = Annotated[str | None, typer.Option("--n", help="Tokens in a batch; several parted by commas.")]
D = Annotated[str | None, typer.Option("--d", help="Width of the activations; several parted by commas.")]
F = Annotated[str | None, typer.Option("--f", help="Latents; several parted by commas.")]
K = Annotated[str | None, typer.Option("--k", help="Latents kept per token; several parted by commas.")]
Dtype = Annotated[str | None, typer.Option(help="Of products: fp32 or bf16. [bf16 on a GPU, fp32 on a CPU]")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [cuda if there is one]")]


@bench_app.command()
def step(
    preset: Preset = None,
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="temposae, eai-sparsify, SAELens, ...; may be given again. [all]")
    ] = None,
    activation: Annotated[
        list[str] | None, typer.Option(help="topk, batchtopk, jumprelu or relu; may be given again. [topk]")
    ] = None,
    auxk: Annotated[
        bool, typer.Option("--auxk", help="With AuxK, every fourth latent dead (topk and batchtopk).")
    ] = False,
    dictionaries: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="So many on the same tokens: temposae's step together, the others' one after another."
        ),
    ] = 1,
    own: Annotated[bool, typer.Option("--own", help="Everyone by their own defaults, too.")] = False,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Samples of everyone.")] = 20,
    clip: Annotated[
        float | None, typer.Option(min=1e-6, max=1e9, help="Clip gradient norms, where that can be chosen. [no]")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time a whole training step (forward, backward, Adam) of every library in one run, on the same tokens.

    The headline: all with fused Adam at one constant learning rate. Everyone takes turns, medians are compared, and each
    must learn. Libraries that aren't installed, or don't have the activation, are left out.
    """
    device_type, dtype_name, shapes = _begin(json_file, device, dtype, preset, n, d, f, k)
    from ..bench import step as steps
    from ..bench.providers import PROVIDERS
    from ..bench.results import record

    contenders = steps.contenders(provider or PROVIDERS, own)
    measured = steps.measure(
        shapes,
        contenders,
        device=device_type,
        dtype=dtype_name,
        rounds=rounds,
        clip=clip,
        activations=activation or ["topk"],
        auxk=auxk,
        dictionaries=dictionaries,
    )
    _finish(record(*measured, device_type), json_file)


@bench_app.command()
def ops(
    preset: Preset = None,
    n: N = None,
    d: D = None,
    f: F = None,
    k: K = None,
    op: Annotated[list[str] | None, typer.Option(help="encode, select_topk, ...; may be given again. [all]")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Samples of each op.")] = 20,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [bf16 on a GPU, fp32 on a CPU]")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time each op, with its FLOPs, its bytes, and the floor that they set."""
    device_type, dtype_name, shapes = _begin(json_file, device, dtype, preset, n, d, f, k)
    from ..bench import ops as suite
    from ..bench.results import record

    _finish(
        record(
            *suite.measure(shapes, op or suite.OPS, device=device_type, dtype=dtype_name, repeats=repeats), device_type
        ),
        json_file,
    )


@bench_app.command()
def streams(
    preset: Annotated[
        str | None, typer.Option(help="tiny, cpu or gpu: sizes to measure. [gpu or cpu, by device]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another language model, at its middle layer.")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time what a stream costs beside its language model: harvesting, the buffer, training 1, 8 and 32 dictionaries.

    All as ratios of what takes turns in one run. On a GPU, a model of Gemma-2-2B's shape with random weights.
    """
    _quiet()
    check_writable(json_file)
    device_type = _device_type(device)
    from ..bench import streams as suite

    results = suite.measure(
        suite.sizes(preset or ("gpu" if device_type == "cuda" else "cpu"), model), device=device_type
    )
    write_json(json_file, results)
    print(suite.table(results), end="")


@bench_app.command()
def runs(
    preset: Annotated[
        str | None, typer.Option(help="tiny, cpu, testbed or gpu: sizes to measure. [gpu or cpu, by device]")
    ] = None,
    only: Annotated[str | None, typer.Option("--runs", help="These runs, as in A1,C2,E4. [all]")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time a training step of every documented run beside a plain TopK step, and all on one stream beside one by one."""
    _quiet()
    check_writable(json_file)
    device_type = _device_type(device)
    from ..bench import documented_runs as suite
    from ..campaign.documented import documented
    from ..engine.errors import UserError

    preset_name = preset or ("gpu" if device_type == "cuda" else "cpu")
    if preset_name not in suite.PRESETS:
        raise UserError(f"preset: {preset_name!r} is not allowed; there are {', '.join(suite.PRESETS)}")
    names = (
        suite.TRAINED if only is None else tuple(dict.fromkeys(documented(n).trained_as or n for n in only.split(",")))
    )
    results = suite.measure(suite.PRESETS[preset_name], names, device=device_type)
    write_json(json_file, results)
    print(suite.table(results), end="")


@bench_app.command("lr")
def learning_rate(
    preset: Annotated[
        str, typer.Option(help="tiny, cpu (synthetic, testbed) or pretrained (smollm2; needs --data).")
    ] = "cpu",
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="synthetic:WIDTH, MODEL:LAYER or NAME=FILE.npy, with every cell of the preset; may be given again. "
            "[the preset's]"
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(help="ACTIVATION,F,K,BATCH,STEPS, as in topk,512,16,256,100; may be given again. [the preset's]"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A model's text, as `train --data` takes it.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Average scores over so many seeds.")] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the figures here after each cell. Cells that it holds are not measured again."
        ),
    ] = None,
) -> None:
    """Train at the default learning rate and at a grid of others, and compare held-out FVU. On the CPU; takes minutes to
    hours, by the preset."""
    _quiet()
    check_writable(json_file)
    from ..bench import learning_rate as suite
    from ..engine.stream.documents import check_data

    if data is not None:
        check_data(data)
    measured_before = suite.read(json_file) if json_file is not None and json_file.is_file() else None
    results = suite.measure(
        suite.plan(preset, source, cell),
        data=data,
        seeds=seeds,
        done=measured_before,
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
        list[str] | None, typer.Option(help="saelens, dictionary_learning or sparsify; may be given again. [all]")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=5, max=10_000, help="Steps of a script's run, of which the median counts.")
    ] = 30,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Time other libraries' own minimal training scripts, before and after the two lines that `accelerate` takes.

    The scripts and their diffs are bench/peers; on a GPU they run under bfloat16 autocast. Libraries that aren't installed
    are left out.
    """
    _quiet()
    check_writable(json_file)
    device_type = _device_type(None)
    from ..bench import before_after as suite

    default_sizes = {"cpu": ("1024", "512", "4096,16384", "32"), "cuda": ("4096", "2304", "65536", "64")}[device_type]
    sizes = [size or default for size, default in zip((n, d, f, k), default_sizes, strict=True)]
    results = suite.measure(
        _shapes("cpu", *sizes), library or list(suite.LIBRARIES), device=device_type, steps=steps, rounds=rounds
    )
    write_json(json_file, results)
    print(suite.table(results), end="")


@bench_app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="Files written by `bench step` or `bench ops`, --json.")],
) -> None:
    """Print measured results as Markdown."""
    from ..bench.results import read
    from ..bench.results import table as markdown

    print("\n".join(markdown(read(path)) for path in files), end="")


@bench_app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and the figures.")] = Path(
        "bench-report"
    ),
    results: Annotated[
        list[Path] | None, typer.Option(help="Measured results; may be given again. [those that come with the package]")
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(min=70, max=200, help="Compile for this sm; may be given again. [80, 90, 100]")
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Compile this kernel; may be given again. [all]")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compile every kernel ahead of time, set what was measured against the floors, and draw both. Needs no GPU.

    On a machine with a GPU, the ops and temposae's step are measured first.
    """
    _quiet()
    from ..bench.report import write as write_report

    check_writable(json_file)
    figures, paths = write_report(out, results=results, archs=arch, kernels=kernel)
    write_json(json_file, figures)
    print((out / "report.md").read_text(), end="")
    print("\nwritten: " + "  ".join(map(str, paths)))


@bench_app.command()
def tune(
    entry: Annotated[
        list[str] | None, typer.Option(help="Entry of the table: encode, merge, ...; may be given again. [all]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a small grid of launch settings on this GPU, and write the best ones to its row of kernels/configs.py.

    At N = 8192, D = 2304, F = 65536, K = 64, mostly in bf16. Takes minutes; run the GPU tests afterwards.
    """
    _quiet()
    check_writable(json_file)
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
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="How many steps.")] = 5,
    trace: Annotated[Path, typer.Option(help="Chrome trace to write; open it in ui.perfetto.dev.")] = Path(
        "trace.json"
    ),
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Show where the time of a training step goes, and write a trace of it."""
    device_type, dtype_name, shapes = _begin(json_file, device, dtype, preset, n, d, f, k)
    from ..bench.profile import run
    from ..bench.profile import table as stages
    from ..bench.results import commit, device_name
    from ..engine.errors import UserError

    if len(shapes) > 1 and (n, d, f, k) != (None,) * 4:
        raise UserError(
            f"--n, --d, --f, --k: {len(shapes)} shapes are not allowed; profile shows one, give a number each"
        )
    check_writable(trace, "trace")
    timings = run(shapes[0], device=device_type, dtype=dtype_name, steps=steps, trace=trace)
    timings |= {"device": device_name(device_type), "commit": commit(), "trace": str(trace)}
    write_json(json_file, timings)
    print(stages(timings), end="")
    print(f"trace: {trace}")


def _begin(
    json_file: Path | None, device: str | None, dtype: str | None, preset: str | None,
    n: str | None, d: str | None, f: str | None, k: str | None,
) -> tuple[str, str, Any]:  # fmt: skip
    """Device, dtype and shapes; what can be refused is refused here."""
    _quiet()
    check_writable(json_file)
    device_type = _device_type(device)
    from ..bench.data import DTYPES
    from ..engine.errors import UserError

    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype: {dtype!r} is not allowed; it must be one of {', '.join(DTYPES)}")
    default_preset, default_dtype = ("gpu", "bf16") if device_type == "cuda" else ("cpu", "fp32")
    return device_type, dtype or default_dtype, _shapes(preset or default_preset, n, d, f, k)


def _shapes(preset: str, n: str | None, d: str | None, f: str | None, k: str | None) -> Any:
    """The shapes that the options ask for; a mistake names the option."""
    from ..bench.data import shapes
    from ..engine.errors import UserError

    try:
        return shapes(preset, N=n, D=d, F=f, K=k)
    except UserError as error:
        field, colon, rest = str(error).partition(": ")
        raise UserError(f"--{field.lower()}{colon}{rest}" if field in ("N", "D", "F", "K") else error) from None


def _device_type(device: str | None) -> str:
    """The device that was asked for, or the one that there is; and a backend that can run there."""
    import torch

    from ..engine.errors import UserError
    from ..kernels.backend import why

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device: {device!r} is not allowed; it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' is not allowed; torch finds no GPU here")
    try:
        why()
    except ValueError as error:
        raise UserError(str(error)) from None
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _finish(results: dict[str, Any], json_file: Path | None) -> None:
    from ..bench.results import table as markdown

    write_json(json_file, results)
    print(markdown(results), end="")


def _quiet() -> None:
    """The profiler, which counts memory on a CPU, tells the terminal about its stages. Read when torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
