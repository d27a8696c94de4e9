"""Sweeps: one file of settings made into many dictionaries for one stream."""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .config import MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig
from .errors import UserError, near
from .parts import reads
from .stream import LanguageModel
from .stream.cache import read_manifest
from .stream.own import open_file, settle

#: settings of `train` that are one for all dictionaries of a stream
_COMMON = ("batch", "checkpoint_every_steps", "log")
_UNKNOWN = 2**20  # a width that is not known yet, with which all goes that goes with some width
#: where a setting that may differ between the dictionaries of a stream belongs
_PLACES = (
    {name: ("sae", name) for name in SAEConfig.model_fields if name != "mask"}
    | {name: ("train", name) for name in TrainConfig.model_fields if name not in _COMMON}
    | {f"mask.{name}": ("sae", "mask", name) for name in MaskConfig.model_fields}
    | {key: ("stream", key) for key in ("hook", "layer", "target", "second")}
)


def expand(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each dictionary by name, {stream, sae, train}, from those of a file.

    `sweep: {k: [16, 32], lr: [1e-4, 3e-4]}` stands for every combination of its lists. `dictionaries: [{k: 16}, {k: 32,
    layer: 2, name: deep}]` lists them one by one; with both, each of the list is taken in every combination. What may differ
    are the settings of sae and train (but batch, checkpoint_every_steps and log), `mask.*`, `layer` or `hook`, and `target`.
    Names follow from what differs (`k16_lr0.0003`), unless given. Without either section there is one dictionary, "".
    """
    common = {key: value for key, value in settings.items() if key not in ("sweep", "dictionaries")}
    lists, listed = settings.get("sweep", {}), settings.get("dictionaries", [{}])
    if not isinstance(lists, dict):
        raise UserError(f"sweep: {lists!r} is not allowed; it must be a section of settings with lists of values")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"dictionaries: {listed!r} is not allowed; it must be a list of sections of settings")
    for key, values in lists.items():
        _place("sweep", key)
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep.{key}: {values!r} is not allowed; it must be a list of values, such as [{values}]")
    found: dict[str, dict[str, Any]] = {}
    for one in listed:
        given = {key: value for key, value in one.items() if key != "name"}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            if both := given.keys() & chosen.keys():
                raise UserError(
                    f"dictionaries: {min(both)} is not allowed there and in sweep; give it in one of the two"
                )
            own = [str(one["name"])] if "name" in one else [_label(setting) for setting in given.items()]
            name = "_".join([*own, *map(_label, chosen.items())])
            if name in found:
                raise UserError(f"dictionaries: {name!r} comes twice; give names that differ")
            if not re.fullmatch(r"[\w.+-]*", name) or name in ("checkpoints", "figures", "evals", ".", ".."):
                raise UserError(f"dictionaries.name: {name!r} is not allowed; it must do as a folder's name")
            found[name] = _merged(common, given | chosen)
    return found


def _place(section: str, key: str) -> tuple[str, ...]:
    if key not in _PLACES:
        if key in _COMMON:
            raise UserError(f"{section}.{key}: not allowed; it is one for all dictionaries of a stream")
        raise UserError(f"{section}.{key}: no setting that may differ between dictionaries; {near(str(key), _PLACES)}")
    return _PLACES[key]


def _label(setting: tuple[str, Any]) -> str:
    key, value = setting
    key = key.rpartition(".")[2]
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    if isinstance(value, list):
        value = "-".join(map(str, value))
    return value if isinstance(value, str) else f"{key}{value}"


def _merged(common: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """`common` with the chosen settings put in their places; the sections on the way are copies."""
    found = dict(common)
    for key, value in chosen.items():
        *sections, last = _place("dictionaries", key)
        inner = found
        for section in sections:
            under = inner.get(section) or {}
            if not isinstance(under, dict):
                raise UserError(f"{section}: {under!r} is not allowed; it must be a section of settings")
            inner[section] = dict(under)
            inner = inner[section]
        inner[last] = value
        if key in ("hook", "layer"):  # one replaces the other
            inner.pop("layer" if key == "hook" else "hook", None)
    return found


def resolve(settings: Mapping[str, Mapping[str, Any]]) -> tuple[LanguageModel | None, dict[str, RunConfig]]:
    """The language model and the settings of each dictionary, those of `expand` with what the model's width and layers
    decide. All that can be refused without the model is refused before it is loaded; with a cache, which knows them too, no
    model is."""
    layers: dict[str, int | None] = {}
    streams: dict[str, StreamConfig] = {}
    for name, given in settings.items():
        with _named(name):
            stream = given.get("stream") or {}
            layers[name] = stream.get("layer")
            streams[name] = StreamConfig(**{key: value for key, value in stream.items() if key != "layer"})
            if layers[name] is not None and streams[name].hook is not None:
                raise UserError("stream.hook: give a hook or a layer, not both")
            _run(given, streams[name], *([_UNKNOWN] * (1 if streams[name].target is None else 2)))
    first = next(iter(streams.values()))
    if first.activations is not None:
        source = open_file(first.activations)
        settled = {}
        for name, stream in streams.items():
            with _named(name):
                if layers[name] is not None:
                    raise UserError(f"layer: {layers[name]} is not allowed with activations, which have no model")
                settled[name] = settle(stream, source)
        return None, _resolved(settings, settled, source.widths)
    if first.cache is not None:
        manifest = read_manifest(first.cache)
        settled = {}
        for name, stream in streams.items():
            with _named(name):
                settled[name] = manifest.settle(stream, layers[name])
        return None, _resolved(settings, settled, manifest.hooks)
    model = LanguageModel(first.model, attention=first.attention, compile=first.compile)
    hooks: dict[str, tuple[str, ...]] = {}
    for name, stream in streams.items():
        with _named(name):
            place = model.place(stream.hook, layers[name])
            if stream.second is None and "second" in reads(_sae(settings[name])):
                streams[name] = stream = stream.model_copy(update={"second": _earlier(place)})
            others = [model.place(hook) for hook in (stream.target, stream.second) if hook is not None]
            hooks[name] = (place, *others)
    model.use(hooks=[hook for each in hooks.values() for hook in each])
    placed = {name: stream.model_copy(update={"hook": hooks[name][0]}) for name, stream in streams.items()}
    return model, _resolved(settings, placed, model.widths)


def _resolved(
    settings: Mapping[str, Mapping[str, Any]], streams: Mapping[str, StreamConfig], widths: Mapping[str, int]
) -> dict[str, RunConfig]:
    """The settings of each dictionary, at hooks whose widths are known."""
    found = {}
    for name, given in settings.items():
        with _named(name):
            found[name] = _run(given, streams[name], *(widths[hook] for hook in streams[name].hooks))
    return found


def _run(given: Mapping[str, Any], stream: StreamConfig, d_in: int, d_out: int | None = None) -> RunConfig:
    """A dictionary has 8 times as many latents as the model's width, unless its settings say how many."""
    others = {key: value for key, value in given.items() if key not in ("stream", "sae")}
    own = dict(_sae(given))
    if isinstance(mask := own.get("mask", {}), dict):
        own["mask"] = {"positions": stream.context, **mask}  # as long as the rows, unless it says otherwise
    # before the width is known, so many that every k fits
    unresolved: dict[str, Any] = {"d_in": d_in, "d_sae": 2**30 if d_in == _UNKNOWN else 8 * d_in, "d_out": d_out}
    return RunConfig(stream=stream, sae=SAEConfig(**(unresolved | own)), **others)


def _sae(given: Mapping[str, Any]) -> dict[str, Any]:
    sae = given.get("sae") or {}
    if not isinstance(sae, dict):
        raise UserError(f"sae: {sae!r} is not allowed; it must be a section of settings")
    return sae


def _earlier(hook: str) -> str:
    """The same hook a layer before, or of the first layer, one after."""
    found = re.fullmatch(r"(\D*)(\d+)(\..*)", hook)
    if found is None:
        raise UserError(f"stream.second: needed; {hook} names no layer, so that another hook must be given")
    layer = int(found[2])
    return f"{found[1]}{layer - 1 if layer else 1}{found[3]}"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A mistake in one of several dictionaries begins with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
