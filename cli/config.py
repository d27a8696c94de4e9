"""`temposae config`: check a config file, or explain settings."""

import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..engine.errors import UserError, near, shown
from ..engine.storage.path_names import expand_path
from .options import Plugin

if TYPE_CHECKING:
    from ..engine.config.explain import Section, Setting

WIDTH = 100  # characters in a line of an explanation
BAR = "\\|"  # a bar inside a Markdown table cell
PAGE = """# Settings

This page is `temposae config --explain --markdown`, written from the classes of the settings.

`temposae config FILE` checks a config file and prints it with all defaults. `temposae config --explain train.lr` explains
one setting, and takes the name of a section (`train`, `sae.mask`) or a part (`layer_norm`) as well.

In the descriptions D is the width of the activations, F the number of latents, T the number of positions and N the number of
tokens in a batch. Training scales activations to a mean norm of about sqrt(D). Shares of a run are numbers from 0 to 1.
"""
PARTS = """## Parts

`sae.parts` lists parts by their `kind`, each with the settings below. Their formulas are in the docstrings in `variants/`,
and [variants.md](variants.md) says where each one acts.
"""


def config(
    source: Annotated[
        str | None,
        Argument(
            metavar="FILE|NAME",
            show_default=False,
            help="YAML file for temposae train or campaign. With --explain: a setting (train.lr), a section (sae.mask) or "
            "a part (layer_norm).",
        ),
    ] = None,
    explain: Annotated[bool, Option("--explain", help="Explain the setting NAME, or all settings.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="With --explain: print docs/settings.md.")] = False,
    plugin: Plugin = None,
) -> None:
    """Check a config file and print all settings, or explain them.

    Settings that the file leaves out are printed with their defaults. No model is loaded, so settings that depend on it
    (sae.d_in, and sae.d_sae by default) are left out.
    """
    if markdown and (not explain or source is not None):
        raise UserError("--markdown: not allowed here; give it with --explain and without NAME")
    if not explain and source is None:
        raise UserError("FILE: missing; give a file to check, or --explain")
    if markdown:
        print(settings_page(), end="")
    elif explain:
        print(_explanation(source))
    else:
        print(_resolved(expand_path(str(source), "config")), end="")


def _resolved(path: Path) -> str:
    """Return the settings in a file with their defaults, as YAML for `temposae train` or `campaign`."""
    import yaml

    from ..campaign.config import CampaignConfig, entries
    from ..engine.config import RunConfig, SweepConfig, read_yaml
    from ..engine.sweep import as_file, expand, resolve_without_model

    settings = read_yaml(path)
    resolved: dict[str, Any]
    if settings.keys() & (CampaignConfig.model_fields.keys() - RunConfig.model_fields.keys()):
        campaign = CampaignConfig(**settings)
        resolve_without_model({run.name: run.sections for run in entries(campaign)})
        resolved = campaign.model_dump(mode="json")
    elif isinstance(settings.get("dictionaries"), dict):  # the config.yaml of a sweep's folder
        resolved = as_file(SweepConfig(**settings).model_dump(mode="json")["dictionaries"])
    else:
        runs = resolve_without_model(expand(settings))
        resolved = runs.get("") or as_file(runs)
    return yaml.safe_dump(resolved, sort_keys=False)


def _config_sections() -> "Iterator[Section]":
    from ..engine.config.explain import SECTIONS, explain

    for name, classes in SECTIONS.items():
        yield explain(name, classes[0], *classes)
    from ..campaign.config import CampaignConfig  # imports torch

    yield explain("campaign", CampaignConfig, CampaignConfig)


def _part_sections(own: bool) -> "Iterator[Section]":
    """The settings of temposae's own parts or of all installed ones. The section's name is the part's kind."""
    from ..engine.config.explain import explain
    from ..engine.registry import installed, is_own

    for kind, cls in sorted(installed().items()):
        if is_own(cls) or not own:
            section = explain(kind, cls, cls.Settings)
            yield section._replace(settings=tuple(setting for setting in section.settings if setting.name != "kind"))


def _explanation(name: str | None) -> str:
    from ..engine.config.explain import SECTIONS

    sections = chain(_config_sections(), _part_sections(own=False))
    if name is None:
        return "\n\n".join(map(_section_text, sections))
    known_names: list[str] = []
    for section in sections:  # lazily, because parts take seconds to import
        if name == section.name:
            return _section_text(section)
        for setting in section.settings:
            setting_name = f"{section.name}.{setting.name}"
            if name == setting_name and name not in SECTIONS:
                return _setting_text(setting_name, setting)
            known_names.append(setting_name)
        known_names.append(section.name)
    raise UserError(f"{shown(name)}: no such setting, section or part; {near(name, known_names)}")


def _section_text(section: "Section") -> str:
    settings = [textwrap.indent(_setting_text(setting.name, setting), "  ") for setting in section.settings]
    return "\n".join([*textwrap.wrap(f"{section.name}: {section.summary}", WIDTH), *settings])


def _setting_text(name: str, setting: "Setting") -> str:
    description = textwrap.wrap(setting.description, WIDTH, initial_indent="    ", subsequent_indent="    ")
    default = "required" if setting.default is None else f"default {setting.default}"
    return "\n".join([f"{name}: {setting.allowed}; {default}", *description])


def settings_page() -> str:
    """The text of docs/settings.md."""
    sections = [_section_page(section, "##") for section in _config_sections()]
    parts = [_section_page(section, "###") for section in _part_sections(own=True)]
    return "\n".join([PAGE, *sections, PARTS, *parts])


def _section_page(section: "Section", heading: str) -> str:
    lines = [f"{heading} {section.name}", "", section.summary, ""]
    if section.settings:
        lines += ["| setting | allowed | default | description |", "| --- | --- | --- | --- |"]
    for setting in section.settings:
        default = "required" if setting.default is None else f"`{setting.default}`"
        cells = (f"`{setting.name}`", setting.allowed, default, setting.description)
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(lines).rstrip() + "\n"
