"""`temposae run`, `temposae campaign` and `temposae plot`: the documented runs."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..engine.errors import UserError
from ..engine.process.signals import stop_advice
from ..engine.storage.files import write_json
from .options import Data, Hook, JsonFile, Latents, Layer, Model, Plugin, Resume, check_backend, merge
from .output import campaign_table

Evals = Annotated[
    str | None,
    Option(help="Evals separated by commas, as in core,positions. Core always runs. [default: the logs' seven]"),
]
Out = Annotated[Path | None, Option(help="Folder to create. [default: runs/NAME-DATE-TIME]")]


def run(
    name: Annotated[
        str | None, Argument(metavar="RUN", help="A1 to E9, relu, topk or batchtopk.", show_default=False)
    ] = None,
    listed: Annotated[bool, Option("--list", help="List the runs with settings and estimated times.")] = False,
    model: Model = None,
    layer: Layer = None,
    hook: Hook = None,
    data: Data = None,
    activation: Annotated[str | None, Option(help="relu, topk or batchtopk. [default: the run's, mostly relu]")] = None,
    d_sae: Latents = None,
    k: Annotated[int | None, Option(help="Latents kept per token by topk and batchtopk. [default: 32]")] = None,
    l1: Annotated[float | None, Option(help="L1 coefficient. [default: the run's, mostly 0.04]")] = None,
    target_l0: Annotated[float | None, Option(help="Active latents per token, by adjusting L1. [default: off]")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate. [default: the run's, mostly 3e-4]")] = None,
    tokens: Annotated[int | None, Option(help="Number of tokens to train on. [default: the run's]")] = None,
    seeds: Annotated[int, Option(min=1, max=1000, help="Number of seeds to train with.")] = 1,
    evals: Evals = None,
    out: Out = None,
    resume: Resume = False,
    json_file: JsonFile = None,
) -> None:
    """Train and evaluate one of the documented runs.

    Also trains a plain dictionary with the same activation. Hyper-parameters are those of the logs. C7 is an analysis
    of C6, so `temposae run C7` trains C6.
    """
    from ..campaign.config import PLAIN, fitting_share, ratio
    from ..campaign.documented import RUNS, documented, settings
    from .output import documented_list

    if listed:
        documented_list(activation, d_sae, k, tokens)
        return
    if name is None:
        raise UserError("run: give one, as in temposae run A2; --list shows them all")
    documented(name)
    # values for the run itself; the plain dictionary gets the logs' usual share of them
    l1 = None if l1 is None else l1 / ratio(name, "sae", "l1_coefficient")
    lr = None if lr is None else lr / ratio(name, "train", "lr")
    sae = {"activation": activation, "d_sae": d_sae, "k": k, "l1_coefficient": l1}
    plain_activation = activation or settings(name)["sae"]["activation"]
    plain_activation = plain_activation if plain_activation in PLAIN else "relu"
    stream = {"model": model, "layer": layer, "hook": hook, "data": data}
    train = {"lr": lr, "tokens": tokens, "target_l0": target_l0}
    config = merge({"train": {"held_out_rows": 64}}, {"sae": sae, "stream": stream, "train": train})
    config |= {
        "runs": [name] if name in RUNS else [],
        "baselines": [plain_activation] if name in RUNS else [name],
        "seeds": seeds,
    }
    config |= {"evals": evals.split(",")} if evals is not None else {}
    config |= {"share": fitting_share(tokens)} if tokens is not None else {}
    _campaign(name, config, out, resume, json_file)


def campaign(
    config: Annotated[
        Path | None,
        Argument(
            show_default=False,
            help="YAML file with runs, baselines, seeds, axes, stream, sae, train and evals. Options override it.",
        ),
    ] = None,
    runs: Annotated[str | None, Option(help="Runs separated by commas, as in A1,C2,E4. [default: all 42]")] = None,
    seeds: Annotated[int | None, Option(min=1, max=1000, help="Number of seeds per run. [default: 1]")] = None,
    model: Model = None,
    layer: Layer = None,
    data: Data = None,
    d_sae: Latents = None,
    tokens: Annotated[int | None, Option(help="Number of tokens to train on. [default: the runs']")] = None,
    evals: Evals = None,
    quick: Annotated[
        bool,
        Option("--quick", help="Small: F = 512, K = 16 instead of L1, 100,000 tokens, main scores. Takes minutes."),
    ] = False,
    out: Out = None,
    resume: Resume = False,
    plugin: Plugin = None,
    json_file: JsonFile = None,
) -> None:
    """Train, evaluate and compare all documented runs.

    All runs train on the batches of one stream, with plain dictionaries of the same size and a random control for each.
    Writes report.md, report.html and figures.
    """
    from ..campaign.config import QUICK, fitting_share
    from ..engine.config import read_yaml

    section_options = {
        "stream": {"model": model, "layer": layer, "data": data},
        "sae": {"d_sae": d_sae},
        "train": {"tokens": tokens},
    }
    options = merge(read_yaml(config) if config else {}, section_options)
    if quick:
        sections = {name: options.pop(name) for name in section_options}
        options = merge(QUICK, sections) | options
    options |= {"runs": runs.split(",")} if runs is not None else {}
    options |= {"seeds": seeds} if seeds is not None else {}
    options |= {"evals": evals.split(",")} if evals is not None else {}
    options = {"share": fitting_share(tokens)} | options if tokens is not None else options
    _campaign("campaign", options, out, resume, json_file)


def plot(
    folder: Annotated[Path, Argument(metavar="RUN|CAMPAIGN", help="Folder of temposae run or campaign.")],
) -> None:
    """Redraw the figures and the report of a run or campaign.

    Uses the saved results and measures nothing.
    """
    from ..campaign.figures import draw, missing
    from ..campaign.report import write
    from ..campaign.run_campaign import read_config

    read_config(folder)
    for path in draw(folder):
        print(path)
    for name, why in missing(folder).items():
        print(f"{name}: {why}", file=sys.stderr)
    print(write(folder))


def _campaign(name: str, settings: dict[str, Any], out: Path | None, resume: bool, json_file: Path | None) -> None:
    from ..campaign.config import CampaignConfig
    from ..campaign.run_campaign import campaign, read_config

    began = time.monotonic()
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_backend()
    if resume:
        if out is None:
            raise UserError("resume: give --out FOLDER, the folder of the run or campaign to continue")
        config = read_config(out)
    else:
        config = CampaignConfig(**settings)
    with stop_advice(f"stopped; --resume with --out {folder} continues and repeats only unfinished evaluations"):
        results = campaign(config, folder, resume=resume)
    write_json(json_file, results)
    campaign_table(results)
    print(f"report: {folder / 'report.html'}   figures: {folder / 'figures'}   {time.monotonic() - began:.0f} s")
