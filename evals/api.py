"""What is done with a trained dictionary from Python: `temposae.evaluate` and `temposae.dashboard`; and where it is done."""

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
from .row_budget import row_counts
from .run_evals import evaluate as measure

Dictionary = str | Path | SparseAutoencoder | Run
BUFFERLESS: dict[str, Any] = {"mode": "tokens", "buffer_tokens": None, "buffer_gb": None}  # where no batch is drawn


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
    control: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure a dictionary beside its controls, as `temposae eval` does; returns the results by eval.

        scores = ts.evaluate("runs/mine")["core"]
        scores["explained_variance"], scores["controls"]["random"]["explained_variance"]
        ts.evaluate("runs/mine", ["core", "sparse_probing"])
        ts.evaluate(sae, stream=stream)  # a dictionary or a `Run` in hand

    `sae`: a run folder, a checkpoint, another library's folder or a name on the hub (as for `load`); or a dictionary or
    `Run` in hand, which needs a `stream`. `evals`: a name, several, or "all" (docs/evals.md lists them). `model`, `layer`,
    `hook` and `data` say where to measure instead of where it was trained, or a `stream` does. The others are the options of
    `temposae eval`. Results of a run folder, measured where it was trained, are kept there with
    a report.

    Raises UserError for an eval that is not known, and where a dictionary doesn't fit the stream.
    """
    names = list(suite.EVALS) if evals == "all" else [evals] if isinstance(evals, str) else list(evals)
    for name in names:
        suite.load_eval(name)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = _checkpoint_of(sae, stream, Path(work))
        elsewhere = stream is not None or any(option is not None for option in (model, layer, hook, data))
        measured_stream = stream or stream_of(checkpoint, model, layer, hook, data, tokens=100_000)
        run_folder = None if elsewhere else checkpoint.of_run
        return measure(
            checkpoint, measured_stream, run_folder, names,
            seed=seed, sets=sets, files=files, fresh=fresh, rows=rows, control=control,
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
    """Look at latents one by one: how often and where in a row each fires, on which texts, and what it does to the logits.

        ts.dashboard("runs/mine", "page.html", count=50)
        shown = ts.dashboard(run, stream=stream, latents=[3, 17])
        shown["latents"][0]["strongest"][0]

    Returns the figures in plain numbers (`evals.dashboard.dashboard` lists them), and with `out` writes them as a page, one
    HTML file. `latents`, or `count` of them spread over the ranks of firing rate, are looked at on held-out `rows`: as many
    as fit the run and the model unless given (`dashboard_rows`).
    `evaluate` says what `sae` and the other arguments may be. Raises UserError for latents that there are not, and where a
    dictionary doesn't fit the stream.
    """
    with tempfile.TemporaryDirectory() as work:
        checkpoint = _checkpoint_of(sae, stream, Path(work))
        measured_stream = stream or stream_of(checkpoint, model, layer, hook, data, tokens=1, **BUFFERLESS)
        dictionary = checkpoint.dictionary()
        chosen = None if latents is None else board.numbers(",".join(map(str, latents)), dictionary.cfg.d_sae)
        name = expand_path(sae, "sae").resolve().name if isinstance(sae, str | Path) else type(sae).__name__
        shown = board.dashboard(
            measured_stream,
            dictionary,
            name=name,
            latents=chosen,
            count=count,
            rows=rows or dashboard_rows(checkpoint, measured_stream),
        )
    if out is not None:
        board.write(expand_path(out, "out"), shown)
    return shown


def dashboard_rows(checkpoint: Checkpoint, stream: ActivationStream) -> int:
    """How many held-out rows the dashboard looks at: 1024, or as many as other evals read where the run or the model asks
    for fewer (`row_budget.row_counts`)."""
    tokens = (TrainConfig() if checkpoint.run is None else checkpoint.run.train).tokens
    return min(1024, row_counts(stream, EvalConfig(), tokens, ()).other_rows or 1024)


def _checkpoint_of(sae: Dictionary, stream: ActivationStream | None, work: Path) -> Checkpoint:
    """The checkpoint of a dictionary; one in hand is saved to `work`."""
    if isinstance(sae, str | Path):
        return checkpoint_files.find(expand_path(sae, "sae"))
    if stream is None:
        raise UserError(
            "stream: needed for a dictionary in hand; give an ActivationStream, or a run folder in its place"
        )
    dictionaries = {"sae": sae.sae, "random": sae.random} if isinstance(sae, Run) else {"sae": sae}
    states = {name: (d.cfg, d.state_dict()) for name, d in dictionaries.items() if d is not None}
    checkpoint_files.write(work / "sae", 0, states)
    return checkpoint_files.find(work / "sae")


def stream_of(
    checkpoint: Checkpoint, model: str | None, layer: int | None, hook: str | None, data: str | None, *,
    tokens: int, **settings: Any,
) -> ActivationStream:  # fmt: skip
    """The stream that a dictionary was trained on, with what the options and `settings` change of it. Where another library
    saved it, what its folder says of model and hook is used, and told."""
    checkpoint.expect("sae")
    run, saved_settings = checkpoint.run, stream_settings(checkpoint.where)
    if run is not None and run.stream.activations is not None and model is None:
        raise UserError(
            f"model: {checkpoint.folder} was trained on {run.stream.activations}, without a model; give --model, and "
            "--hook or --layer"
        )
    if model is None and saved_settings.get("model") is None:
        saved_hook = saved_settings.get("hook")
        reason = f"says {saved_hook}, but not of which model" if saved_hook else "does not say what it was trained on"
        raise UserError(
            f"model: {checkpoint.folder} {reason}; give --model{'' if saved_hook else ', and --hook or --layer'}"
        )
    trained_on = run.stream if run is not None else StreamConfig(**saved_settings)
    drop = {"activations"} | ({"hook"} if layer is not None or not saved_settings else set())
    overrides: dict[str, Any] = {k: v for k, v in {"model": model, "hook": hook, "data": data}.items() if v is not None}
    config = StreamConfig(**(trained_on.model_dump(exclude=drop) | overrides | settings))
    if any(option is not None for option in (model, layer, hook, data)):
        config = config.model_copy(update={"cache": None})  # another model, place or text than it holds
    if isinstance(checkpoint, Loaded):
        keys = ("model", "hook", "target", "data", "context", "bos")
        used = {name: saved_settings[name] for name in keys if saved_settings.get(name) is not None}
        used = [f"{name} {as_json(value)}" for name, value in used.items() if value == getattr(config, name)]
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
