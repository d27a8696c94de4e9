"""`temposae run`, `temposae campaign` and `temposae plot`: the documented runs."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..engine.storage.files import check_writable, write_json
from .options import Data, Hook, JsonFile, Layer, Model, Plugin, check_backend
from .output import campaign_table

Evals = Annotated[
    str | None,
    typer.Option(help="Measure these evals, as in core,positions; core always is. [the logs' seven]"),
]
Out = Annotated[Path | None, typer.Option(help="Folder to make. [runs/NAME-DATE-TIME]")]


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A1 to E9, or relu, topk, batchtopk.", show_default=False)
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the runs, with their settings and expected times, and stop.")
    ] = False,
    model: Model = None,
    layer: Layer = None,
    hook: Hook = None,
    data: Data = None,
    activation: Annotated[
        str | None, typer.Option(help="relu, topk or batchtopk in place of the run's own. [relu]")
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="F, the number of latents. [2304]")] = None,
    k: Annotated[int | None, typer.Option(help="Latents kept per token, of topk and batchtopk. [32]")] = None,
    l1: Annotated[float | None, typer.Option(help="L1 coefficient. [the run's own, mostly 0.04]")] = None,
    target_l0: Annotated[
        float | None, typer.Option(help="Change the L1 coefficient until so many latents are active on a token.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [the run's own, mostly 3e-4]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. [the run's own]")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Train with so many seeds.")] = 1,
    evals: Evals = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Train one of the documented runs, and a plain dictionary of its activation beside it; measure both; draw what the
    logs name.

    Hyper-parameters are those of the logs. `temposae run C7` trains C6, which C7 looks at.
    """
    from ..campaign.config import PLAIN, fitting_share, ratio
    from ..campaign.documented import RUNS, documented, settings
    from ..engine.errors import UserError
    from .output import documented_list

    if listed:
        documented_list(activation, d_sae, k, tokens)
        return
    if name is None:
        raise UserError("run: give one, as in temposae run A2; --list shows them all")
    documented(name)
    # what the run itself is to have; the plain dictionary beside it has the logs' usual share of that
    l1 = None if l1 is None else l1 / ratio(name, "sae", "l1_coefficient")
    lr = None if lr is None else lr / ratio(name, "train", "lr")
    sae = {"activation": activation, "d_sae": d_sae, "k": k, "l1_coefficient": l1}
    plain_activation = activation or settings(name)["sae"]["activation"]
    plain_activation = plain_activation if plain_activation in PLAIN else "relu"
    stream = {"model": model, "layer": layer, "hook": hook, "data": data}
    train = {"lr": lr, "tokens": tokens, "target_l0": target_l0}
    config: dict[str, Any] = {
        "runs": [name] if name in RUNS else [],
        "baselines": [plain_activation] if name in RUNS else [name],
        "seeds": seeds,
        "sae": {key: value for key, value in sae.items() if value is not None},
        "stream": {key: value for key, value in stream.items() if value is not None},
        "train": {"held_out_rows": 64} | {key: value for key, value in train.items() if value is not None},
    }
    config |= {"evals": evals.split(",")} if evals is not None else {}
    config |= {"share": fitting_share(tokens)} if tokens is not None else {}
    _campaign(config, out or _new_folder(name), resume, json_file, out)


def campaign(
    config: Annotated[
        Path | None,
        typer.Argument(
            show_default=False,
            help="YAML: runs, baselines, seeds, axes, stream, sae, train, evals. Options win over it.",
        ),
    ] = None,
    runs: Annotated[str | None, typer.Option(help="These runs, as in A1,C2,E4. [all 42]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="Train each with so many seeds. [1]")] = None,
    model: Model = None,
    layer: Layer = None,
    data: Data = None,
    d_sae: Annotated[int | None, typer.Option(help="F, the number of latents. [2304]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. [the runs' own]")] = None,
    evals: Evals = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Small: F = 512, K = 16 in place of L1, 100,000 tokens, the main scores, in minutes on two cores.",
        ),
    ] = False,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted campaign in --out.")] = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Train all documented runs on the batches of one stream, with plain dictionaries of the same size beside them and a
    random control for each; measure them alike; compare, draw and report."""
    from ..campaign.config import QUICK, fitting_share
    from ..engine.config import read_yaml
    from ..engine.plugins import use
    from .options import merge

    use(plugin)
    options = merge(
        read_yaml(config) if config else {},
        {
            "stream": {"model": model, "layer": layer, "data": data},
            "sae": {"d_sae": d_sae},
            "train": {"tokens": tokens},
        },
    )
    if quick:
        options = merge(QUICK, {key: options[key] for key in ("stream", "sae", "train") if key in options}) | {
            key: value for key, value in options.items() if key not in ("stream", "sae", "train")
        }
    options |= {"runs": runs.split(",")} if runs is not None else {}
    options |= {"seeds": seeds} if seeds is not None else {}
    options |= {"evals": evals.split(",")} if evals is not None else {}
    options = {"share": fitting_share(tokens)} | options if tokens is not None else options
    _campaign(options, out or _new_folder("campaign"), resume, json_file, out)


def plot(
    folder: Annotated[Path, typer.Argument(metavar="RUN|CAMPAIGN", help="A folder of temposae run or campaign.")],
) -> None:
    """Draw the figures of a documented run or campaign again, from its saved numbers, and write its report anew."""
    from ..campaign.figures import draw, missing
    from ..campaign.report import write
    from ..campaign.run_campaign import read_config

    read_config(folder)
    for path in draw(folder):
        print(path)
    for name, why in missing(folder).items():
        print(f"{name}: {why}", file=sys.stderr)
    print(write(folder))


def _campaign(settings: dict[str, Any], folder: Path, resume: bool, json_file: Path | None, out: Path | None) -> None:
    from ..campaign.config import CampaignConfig
    from ..campaign.run_campaign import campaign, read_config
    from ..engine.errors import UserError
    from ..engine.process.signals import stop_advice

    began = time.monotonic()
    check_writable(json_file)
    check_backend()
    if resume:
        if out is None:
            raise UserError("resume: give --out FOLDER, the folder of the run or campaign to go on with")
        config = read_config(out)
    else:
        config = CampaignConfig(**settings)
    with stop_advice(f"stopped; --resume with --out {folder} goes on, and measures again only what was not finished"):
        results = campaign(config, folder, resume=resume)
    write_json(json_file, results)
    campaign_table(results)
    print(f"report: {folder / 'report.html'}   figures: {folder / 'figures'}   {time.monotonic() - began:.0f} s")


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
