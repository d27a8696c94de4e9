"""Sweeps: one file of settings made into many dictionaries for one stream."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .config import Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig, section
from .errors import UserError, near, shown
from .names import ALLOWED, check_distinct, folder_name
from .parts import reads
from .stream import LanguageModel
from .stream.cache import read_manifest
from .stream.documents import check_data
from .stream.own import open_file, settle

#: settings of `train` that are one for all dictionaries of a stream
_COMMON = ("batch", "checkpoint_every_steps", "log")
MOST = 1000  # dictionaries of a stream
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
    lists, listed = section(settings, "sweep"), settings.get("dictionaries")
    listed = [{}] if listed is None else listed
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise UserError(f"dictionaries: {shown(listed)} is not allowed; it must be a list of sections of settings")
    for key, values in lists.items():
        _place("sweep", key)
        if not isinstance(values, list) or not values:
            such = shown(values)
            raise UserError(f"sweep.{key}: {such} is not allowed; it must be a list of values, such as [{such}]")
    if (many := len(listed) * math.prod(map(len, lists.values()))) > MOST:
        raise UserError(f"sweep: {many:,} dictionaries are not allowed; a stream has at most {MOST:,}")
    found: dict[str, dict[str, Any]] = {}
    for one in listed:
        given = {key: value for key, value in one.items() if key != "name"}
        for key in given:
            _place("dictionaries", key)
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            if both := given.keys() & chosen.keys():
                raise UserError(
                    f"dictionaries: {min(both)} is not allowed there and in sweep; give it in one of the two"
                )
            own = (
                [_own_name(one["name"])] if "name" in one else [_label("dictionaries", *each) for each in given.items()]
            )
            name = "_".join([*own, *(_label("sweep", *each) for each in chosen.items())])
            if name in found:
                raise UserError(f"dictionaries: {shown(name)} comes twice; give names that differ")
            found[name] = _merged(common, given | chosen)
    _check_names(found)
    return found


def _check_names(names: Iterable[str]) -> None:
    """Names of dictionaries become folders. A single one without a name has the run's."""
    if list(names) == [""]:
        return
    try:
        for name in names:
            folder_name(name)
        check_distinct(names)
    except ValueError as error:
        raise UserError(f"dictionaries.{error}") from None


def _own_name(given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise UserError(f"dictionaries.name: {shown(given)} is not allowed; {ALLOWED}")
    return given if isinstance(given, str) else shown(given)


def _place(section: str, key: str) -> tuple[str, ...]:
    if key not in _PLACES:
        if key in _COMMON:
            raise UserError(f"{section}.{key}: not allowed; it must be one for all dictionaries of a stream")
        raise UserError(f"{section}.{key}: no setting that may differ between dictionaries; {near(str(key), _PLACES)}")
    return _PLACES[key]


def _label(place: str, key: str, value: Any) -> str:
    """What a setting adds to the name of a dictionary that has none of its own."""
    short = key.rpartition(".")[2]
    if isinstance(value, bool):
        return short if value else f"no-{short}"
    text = "-".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else shown(value)
    try:
        folder_name(f"x{text}" if text else "")
    except ValueError:
        raise UserError(
            f"{place}.{key}: {shown(value)} is not allowed; the folder's name is made of it, and it must do for that "
            "(else list dictionaries, each with a name)"
        ) from None
    return text if isinstance(value, str) else f"{short}{text}"


def _merged(common: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """`common` with the chosen settings put in their places; the sections on the way are copies."""
    found = dict(common)
    for key, value in chosen.items():
        *sections, last = _place("dictionaries", key)
        inner = found
        for name in sections:
            inner[name] = dict(section(inner, name))
            inner = inner[name]
        inner[last] = value
        if key in ("hook", "layer"):  # one replaces the other
            inner.pop("layer" if key == "hook" else "hook", None)
    return found


def read_streams(settings: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, StreamConfig], dict[str, int | None]]:
    """The stream's settings for each dictionary, and its layer, where one is given."""
    streams: dict[str, StreamConfig] = {}
    layers: dict[str, int | None] = {}
    for name, given in settings.items():
        with _named(name):
            stream = section(given, "stream")
            layers[name] = Layer(layer=stream.get("layer")).layer
            streams[name] = StreamConfig(**{key: value for key, value in stream.items() if key != "layer"})
            if layers[name] is not None and streams[name].hook is not None:
                raise UserError("stream.hook: give a hook or a layer, not both")
    return streams, layers


def resolve(settings: Mapping[str, Mapping[str, Any]]) -> tuple[LanguageModel | None, dict[str, RunConfig]]:
    """The language model and the settings of each dictionary, those of `expand` with what the model's width and layers
    decide. All that can be refused without the model is refused before it is loaded; with a cache, which knows them too, no
    model is."""
    streams, layers = read_streams(settings)
    for name, given in settings.items():
        with _named(name):
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
    if first.data is not None:
        check_data(first.data)
    model = LanguageModel(first.model, attention=first.attention, compile=first.compile)
    hooks: dict[str, tuple[str, ...]] = {}
    for name, stream in streams.items():
        with _named(name):
            place = model.place(stream.hook, layers[name])
            placed: dict[str, Any] = stream.model_dump(exclude_unset=True) | {"hook": place}
            if stream.second is None and "second" in reads(section(settings[name], "sae")):
                placed["second"] = _earlier(place)
            streams[name] = stream = StreamConfig(**placed)
            others = {key: hook for key in ("target", "second") if (hook := getattr(stream, key)) is not None}
            hooks[name] = (place, *(model.place(hook, field=f"stream.{key}") for key, hook in others.items()))
    model.use(hooks=[hook for each in hooks.values() for hook in each])
    at_hooks = {name: stream.model_copy(update={"hook": hooks[name][0]}) for name, stream in streams.items()}
    return model, _resolved(settings, at_hooks, model.widths)


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
    own = dict(section(given, "sae"))
    if isinstance(mask := own.get("mask", {}), dict):
        own["mask"] = {"positions": stream.context, **mask}  # as long as the rows, unless it says otherwise
    # before the width is known, so many that every k fits
    unresolved: dict[str, Any] = {"d_in": d_in, "d_sae": 2**30 if d_in == _UNKNOWN else 8 * d_in, "d_out": d_out}
    return RunConfig(stream=stream, sae=SAEConfig(**(unresolved | own)), **others)


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
