"""The command line. Commands import torch and other heavy packages when they run, so `--help` is quick."""

import os
import sys
import time
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer import Option

from ..engine.errors import Stopped, UserError
from ..engine.process.signals import stop_on_signals
from ..engine.storage.files import write_json
from .arguments import App
from .bench import bench_app, profile
from .campaign import campaign, plot, run
from .config import config
from .evaluate import dashboard, evaluate, features
from .exchange import convert, upload
from .options import PLAIN, JsonFile
from .output import figures
from .synth import synth_app
from .testbed import testbed_app
from .train import cache, train

app = App(**PLAIN)


@app.callback()
def temposae(_: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Train and study sparse autoencoders on language-model activations."""  # `main` prints it, for any command


app.command(rich_help_panel="Training")(train)
app.command(rich_help_panel="Training")(cache)
app.command("eval", rich_help_panel="Evaluation")(evaluate)
app.command(rich_help_panel="Evaluation")(features)
app.command(rich_help_panel="Evaluation")(dashboard)
app.command(rich_help_panel="Documented runs")(run)
app.command(rich_help_panel="Documented runs")(campaign)
app.command(rich_help_panel="Documented runs")(plot)
app.command(rich_help_panel="Other libraries")(convert)
app.command(rich_help_panel="Other libraries")(upload)
app.command(rich_help_panel="Settings and machine")(config)
app.add_typer(synth_app, name="synth", rich_help_panel="Evaluation")
app.add_typer(testbed_app, name="testbed", rich_help_panel="Settings and machine")
app.add_typer(bench_app, name="bench", rich_help_panel="Speed")
app.command(rich_help_panel="Speed")(profile)


def main() -> None:
    """Run a command. A user's mistake is printed as one line, with exit code 2."""

    # OpenMP threads that spin while they wait make a step ten times slower when another program needs a core. torch reads
    # this when it is imported. Not for benchmarks: waking threads would dominate other libraries' many small products.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--version" in sys.argv[1:]:
        print(f"temposae {version('temposae')}")
        return
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1" and sys.argv[1:2] not in (["train"], ["--help"], ["-h"]):
            command = " ".join(sys.argv[1:2])
            raise UserError(
                f"torchrun: temposae {command} is not allowed; only temposae train runs in several processes"
            )
        with stop_on_signals():
            app()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(60)  # rank 0 prints the error that all ranks meet; once it has ended, torchrun stops the others
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks were stopped
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except (RuntimeError, MemoryError) as error:
        by_type = type(error).__name__ in ("OutOfMemoryError", "MemoryError")  # by name: torch is not imported here
        if not by_type and "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise  # on a CPU torch reports missing memory as a plain RuntimeError
        print("error: out of memory; try a smaller sae.d_sae, train.batch or stream.buffer_tokens", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a deleted file
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


@app.command(rich_help_panel="Settings and machine")
def doctor(json_file: JsonFile = None) -> None:
    """Print versions, GPU, and the backend that would run here."""
    import platform
    from importlib.metadata import PackageNotFoundError

    import torch

    from ..kernels.backend import why

    facts: dict[str, Any] = {"temposae": version("temposae"), "python": platform.python_version()}
    for package in ("torch", "triton", "transformer-lens", "transformers", "datasets", "safetensors"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["gpu"] = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    facts["threads"] = torch.get_num_threads()
    try:
        facts["backend"], facts["why"] = why()
    except ValueError as error:
        facts["backend"], facts["why"] = None, str(error)
    write_json(json_file, facts)
    figures(facts)
    if facts["backend"] is None:
        raise typer.Exit(2)
