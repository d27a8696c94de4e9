"""`temposae.evaluate` and `temposae.dashboard`, and the stream that a dictionary is measured on."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.config import EvalConfig, StreamConfig, TrainConfig
from ..engine.errors import UserError
from ..engine.interchange.hook_metadata import stream_settings
from ..engine.interchange.json_settings import as_json
from ..engine.sae import SparseAutoencoder
from ..engine.storage import checkpoint as checkpoint_files
from ..engine.storage.checkpoint import Checkpoint, Loaded
from ..engine.storage.path_names import expand_path
from ..engine.stream import ActivationStream, LanguageModel
from ..engine.train import Run
from ..kernels.torch_modes import default_modes
from . import dashboard as board
from . import suite
from .judge import Judge
from .row_budget import row_counts
from .run_evals import evaluate as measure

Dictionary = str | Path | SparseAutoencoder | Run
BUFFERLESS: dict[str, Any] = {"mode": "tokens", "buffer_tokens": None, "buffer_gb": None}  # for streams without batches


@default_modes()
def evaluate(
    sae: Dictionary,
    evals: str | Sequence[str] = "core",
    *,
    stream: ActivationStream | None = None,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    data: str | None = None,
    seed: int = 0,
    sets: Sequence[str] = (),
    files: Mapping[str, Sequence[str]] | None = None,
    fresh: bool = False,
    rows: int | None = None,
    controls: Sequence[str] = (),
    reference: Dictionary | None = None,
    same_recipe: Dictionary | None = None,
    protocol: str = "temposae",
    judge: Judge | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure a dictionary and its controls, as `temposae eval` does; returns the results by eval.

        scores = ts.evaluate("runs/mine")["core"]
        scores["explained_variance"], scores["controls"]["random"]["explained_variance"]
        ts.evaluate("runs/mine", ["core", "sparse_probing"])
        ts.evaluate(sae, stream=stream)  # a dictionary or a `Run` object

    `sae`: a run folder, a checkpoint, another library's folder or a name on the hub (as for `load`), or a dictionary or
    `Run` object, which needs a `stream`. `evals`: a name, several names, or "all" (docs/evals.md lists them). `model`,
    `layer`, `hook`, `data` or `stream` measure elsewhere than where the dictionary was trained. `judge`: for autointerp, a
    `temposae.evals.judge.Judge.of(command)`. The other arguments are options of `temposae eval`. If a run folder is
    measured where it was trained, it keeps the results and a report.

    Raises UserError for an unknown eval or a dictionary that doesn't fit the stream.
    """
    names = suite.every_eval(judge) if evals == "all" else [evals] if isinstance(evals, str) else list(evals)
    for name in names:
        suite.load_eval(name)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = _checkpoint_of(sae, stream, Path(work))
        elsewhere = stream is not None or any(option is not None for option in (model, layer, hook, data))
        measured_stream = stream or stream_of(checkpoint, model, layer, hook, data, tokens=100_000)
        run_folder = None if elsewhere else checkpoint.of_run
        others: dict[str, Any] = {}
        for name, other in (("reference", reference), ("same_recipe", same_recipe)):
            if other is not None:
                (folder := Path(work) / name).mkdir()
                others[name] = _checkpoint_of(other, stream, folder)
        return measure(
            checkpoint, measured_stream, run_folder, names,
            seed=seed, sets=sets, files=files, fresh=fresh, rows=rows, controls=controls,
            protocol=protocol, judge=judge, **others,
        )  # fmt: skip


@default_modes()
def dashboard(
    sae: Dictionary,
    out: str | Path | None = None,
    *,
    latents: Sequence[int] | None = None,
    count: int = 100,
    rows: int | None = None,
    stream: ActivationStream | None = None,
    model: str | None = None,
    layer: int | None = None,
    hook: str | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Show single latents: how often and where in a row each fires, in which contexts, and its effect on the logits.

        ts.dashboard("runs/mine", "page.html", count=50)
        shown = ts.dashboard(run, stream=stream, latents=[3, 17])
        shown["latents"][0]["strongest"][0]

    Returns plain numbers (`evals.dashboard.dashboard` lists them). With `out`, also writes them as one HTML page. Shows the
    given `latents`, or `count` latents spread over the ranks of firing rate, on held-out `rows` (default: `dashboard_rows`).
    The other arguments are those of `evaluate`. Raises UserError for latents that don't exist or a dictionary that doesn't
    fit the stream.
    """
    with tempfile.TemporaryDirectory() as work:
        checkpoint = _checkpoint_of(sae, stream, Path(work))
        measured_stream = stream or stream_of(checkpoint, model, layer, hook, data, tokens=1, **BUFFERLESS)
        dictionary = checkpoint.dictionary()
        chosen = None if latents is None else board.numbers(",".join(map(str, latents)), dictionary.cfg.d_sae)
        name = expand_path(sae, "sae").resolve().name if isinstance(sae, str | Path) else type(sae).__name__
        rows = rows or dashboard_rows(checkpoint, measured_stream)
        shown = board.dashboard(measured_stream, dictionary, name=name, latents=chosen, count=count, rows=rows)
    if out is not None:
        board.write(expand_path(out, "out"), shown)
    return shown


def dashboard_rows(checkpoint: Checkpoint, stream: ActivationStream) -> int:
    """Held-out rows for the dashboard: 1024, or fewer if other evals read fewer (`row_budget.row_counts`)."""
    tokens = (TrainConfig() if checkpoint.run is None else checkpoint.run.train).tokens
    return min(1024, row_counts(stream, EvalConfig(), tokens, ()).other_rows or 1024)


def _checkpoint_of(sae: Dictionary, stream: ActivationStream | None, work: Path) -> Checkpoint:
    """Find the checkpoint of a dictionary; a dictionary or `Run` object is saved to `work` first."""
    if isinstance(sae, str | Path):
        return checkpoint_files.find(expand_path(sae, "sae"))
    if stream is None:
        raise UserError("stream: needed for a dictionary object; give an ActivationStream, or a run folder as `sae`")
    dictionaries = sae.dictionaries if isinstance(sae, Run) else {"sae": sae}
    states = {name: (d.cfg, d.state_dict()) for name, d in dictionaries.items()}
    checkpoint_files.write(work / "sae", 0, states)
    return checkpoint_files.find(work / "sae")


def stream_of(
    checkpoint: Checkpoint, model: str | None, layer: int | None, hook: str | None, data: str | None, *,
    tokens: int, **settings: Any,
) -> ActivationStream:  # fmt: skip
    """Open the stream that a dictionary was trained on, changed by the options and `settings`. For a folder of another
    library, print the settings that it names and that are used."""
    checkpoint.expect("sae")
    run, saved = checkpoint.run, stream_settings(checkpoint.where)
    if model is None:
        reason, place = None, ", and --hook or --layer"
        if run is not None and run.stream.activations is not None:
            reason = f"was trained on {run.stream.activations}, without a model"
        elif run is not None and run.stream.world is not None:
            reason = "was trained on a synthetic world, without a model"
        elif saved.get("model") is None and saved.get("hook"):
            reason, place = f"names the hook {saved['hook']}, but no model", ""
        elif saved.get("model") is None:
            reason = "does not say what it was trained on"
        if reason is not None:
            raise UserError(f"model: {checkpoint.folder} {reason}; give --model{place}")
    trained_on = run.stream if run is not None else StreamConfig(**saved)
    drop = {"activations", "world"} | ({"hook"} if layer is not None or not saved else set())
    overrides: dict[str, Any] = {k: v for k, v in {"model": model, "hook": hook, "data": data}.items() if v is not None}
    config = StreamConfig(**(trained_on.model_dump(exclude=drop) | overrides | settings))
    if any(option is not None for option in (model, layer, hook, data)):
        config = config.model_copy(update={"cache": None})  # it holds other activations
    if isinstance(checkpoint, Loaded):
        named = {name: saved.get(name) for name in ("model", "hook", "target", "data", "context", "bos")}
        used = [
            f"{name} {as_json(value)}"
            for name, value in named.items()
            if value is not None and value == getattr(config, name)
        ]
        if used:
            print(f"{checkpoint.folder} says: {', '.join(used)}")
    lm = LanguageModel(config.model, hook=config.hook, layer=layer)
    if config.target is not None:
        lm.use(hooks=[lm.hook, lm.place(config.target)])
    seed = run.train.seed if run is not None else 0
    stream = ActivationStream(config, tokens=tokens, seed=seed, model=lm)
    if model is None and layer is None and hook is None:
        stream.norms.load_report(checkpoint.massive)
    return stream
