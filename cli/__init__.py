"""The command line. Heavy imports wait until a command needs them, so that --help is quick."""

import os
import sys
import time
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ..engine.storage.files import check_writable, write_json
from .arguments import App
from .bench import bench_app, profile
from .campaign import campaign, plot, run
from .config import config
from .evaluate import dashboard, evaluate, features
from .exchange import convert, upload
from .options import PLAIN, JsonFile
from .output import figures
from .testbed import testbed_app
from .train import cache, train

app = App(**PLAIN)


@app.callback()
def temposae(_: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train and study sparse autoencoders on language-model activations."""  # `main` prints it, for any command


app.command()(train)
app.command()(cache)
app.command("eval")(evaluate)
app.command()(features)
app.command()(dashboard)
app.command()(run)
app.command()(campaign)
app.command()(plot)
app.command()(config)
app.command()(convert)
app.command()(upload)
app.add_typer(testbed_app, name="testbed")
app.add_typer(bench_app, name="bench")
app.command()(profile)


def main() -> None:
    """Entry point: runs the command; a user's mistake becomes one line and exit code 2."""
    from ..engine.errors import Stopped, UserError
    from ..engine.process.signals import stop_on_signals

    # OpenMP threads that spin while they wait make a step ten times slower as soon as another program wants a core. Read
    # when torch is imported. Not where others are timed, too: of many small products waking threads is most of the time.
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
        _leave_to_the_first()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started: all of them have
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except (RuntimeError, MemoryError) as error:
        no_memory = type(error).__name__ in ("OutOfMemoryError", "MemoryError")  # torch's, which is not imported here
        if not no_memory and "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
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
def doctor(json_file: JsonFile = None) -> None:
    """Versions, GPU, Triton, and which backend would run here and why."""
    import platform
    from importlib.metadata import PackageNotFoundError

    import torch

    from ..kernels.backend import why

    check_writable(json_file)
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
