"""Settings and argument lists with something wrong about them, drawn at random from a seed."""

import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from temposae.engine.config import EvalConfig, MaskConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.setting_types import kinds

LONG = "long" * 1250
#: what is no number, whatever the field
NO_NUMBERS: tuple[Any, ...] = (
    True, False, "4 ", " 4", "1_000", "0x10", "٣", "four", "", "nan", [4], [], {"a": 1}, math.nan, math.inf, -math.inf,
    5e-324, -1e300, 1e300, 1e19, -(10**30), 10**400, LONG, "4\n5", "\x1b[31m4",
)  # fmt: skip
NO_TEXT: tuple[Any, ...] = (
    0,
    7,
    -1.5,
    True,
    [],
    ["a"],
    {"a": None},
    "",
    "  ",
    "a\nb",
    "\x1b[31mred",
    "a\0b",
    LONG,
    "~nouser/x",
)
NO_SECTION: tuple[Any, ...] = (0, 1, False, True, "", "text", [], [1], 2.5)
NO_NAME: tuple[Any, ...] = (
    "", ".", "..", "../up", "/abs", "a/b", "a\\b", "summary.json", "config.yaml", "Checkpoints", "evals", "metrics.jsonl",
    ".writing-x", ".hidden", "-k", "con", "a" * 300, "a\nb", "x\0", "a.", True, 1.5, [], {"a": 1}, None,
)  # fmt: skip
SECTIONS = {"stream": StreamConfig, "sae": SAEConfig, "train": TrainConfig, "eval": EvalConfig}
BASE = {
    "stream": {"context": 32, "buffer_tokens": 4096},
    "sae": {"d_sae": 64, "k": 4},
    "train": {"batch": 256, "tokens": 4096},
}


class Mutant(NamedTuple):
    """Settings of which `name` (a setting or a section) can't be; empty where they may do."""

    settings: dict[str, Any]
    name: str
    value: Any


def configs(seed: int, count: int) -> Iterator[Mutant]:
    """`count` settings for `temposae train`."""
    draw = random.Random(seed)
    makers = (_field, _field, _field, _field, _unknown, _section, _sweep, _name, _part, _large)
    for _ in range(count):
        settings = {name: dict(values) for name, values in BASE.items()}
        yield draw.choice(makers)(draw, settings)


def _field(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    """A value of another kind, or beyond all ranges, in one field."""
    section = draw.choice([*SECTIONS, "mask"])
    config = SECTIONS.get(section, MaskConfig)
    name = draw.choice([name for name in config.model_fields if name not in ("mask", "parts", "d_in", "d_out")])
    of = kinds(config.model_fields[name].annotation)
    values = NO_NUMBERS if of & {int, float, bool} else NO_TEXT
    if bool in of or name == "max_norm":
        values = tuple(value for value in values if not isinstance(value, bool))
    if of & {tuple, list} or not of & {int, float, bool, str}:
        values = (3, 0.5, "no such value", {"a": 1}, True, LONG)
    value = draw.choice(values)
    place = (
        settings.setdefault("sae", {}).setdefault("mask", {}) if section == "mask" else settings.setdefault(section, {})
    )
    place[name] = value
    return Mutant(settings, name, value)


def _unknown(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    name = draw.choice(
        ["self", "cls", "k ", "K", "tokns", "1", "null", "__init__", "model_fields", "a.b", LONG, "né", "\x1b[1m"]
    )
    settings[draw.choice(list(settings))][name] = draw.choice([1, None, "x", [], {}])
    return Mutant(settings, name, name)


def _section(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    name = draw.choice(["stream", "sae", "train", "eval", "sweep", "mask"])
    value = draw.choice(NO_SECTION)
    (settings["sae"] if name == "mask" else settings)[name] = value
    return Mutant(settings, name, value)


def _sweep(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    settings["sweep"], name = draw.choice(
        [
            ({"k": value} if not isinstance(value, list) or not value else {"k": value[0]}, "k") for value in NO_NUMBERS
        ]
        + [({"batch": [1]}, "batch"), ({"kk": [1]}, "kk"), ({"k": list(range(1, 65)), "seed": list(range(1000))}, "sweep")]
        + [({"lr": [0.1, value]}, "lr") for value in NO_NUMBERS if not isinstance(value, list | dict)]
    )  # fmt: skip
    return Mutant(settings, name, None)


def _name(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    value = draw.choice(NO_NAME)
    settings["dictionaries"] = [{"k": 2}, {"k": 3, "name": value}]
    return Mutant(settings, "name", value)


def _part(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    part = draw.choice(
        [3, "feature_dropout", [], {"p": 0.1}, {"kind": [1]}, {"kind": None}, {"kind": True}, {"kind": LONG}]
        + [{"kind": "feature_dropout", "p": value} for value in NO_NUMBERS]
        + [{"kind": "feature_dropout", "self": 1}, {"kind": "no_such_part"}, {"kind": "feature_dropout", "factor": 1}]
    )
    settings["sae"]["parts"] = draw.choice([[part], [part], part or 3])
    return Mutant(settings, "parts", part)


def _large(draw: random.Random, settings: dict[str, Any]) -> Mutant:
    """Numbers that a computer can hold and nobody can mean."""
    section, name, value = draw.choice(
        [
            ("stream", "rows_per_forward", 2**62), ("stream", "context", 2**40), ("stream", "buffer_gb", 1e30),
            ("stream", "max_norm", 1e12), ("sae", "l0_coefficient", 1e30), ("sae", "l1_coefficient", 1e14),
            ("sae", "initial_threshold", 1e5), ("sae", "bandwidth", 1e12), ("train", "held_out_rows", 2147483647),
            ("train", "lr", 1e6), ("train", "clip_norm", 1e-11), ("eval", "rows", 2**40), ("train", "tokens", 2**62),
            ("train", "warmup", 1e-300), ("sae", "aux_k", 2**40), ("train", "seed", 2**64), ("sae", "d_sae", 2**31),
        ]
    )  # fmt: skip
    settings.setdefault(section, {})[name] = value
    return Mutant(settings, name, value)


def texts(seed: int, count: int) -> Iterator[bytes]:
    """`count` files that were to hold settings: cut, with bytes changed, or put together to be too much."""
    import yaml

    draw = random.Random(seed)
    whole = yaml.safe_dump(BASE).encode()
    bomb = b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)
    )
    made = (
        bomb, b"[" * 20_000, b"{a: " * 5_000, b"a: &a [*a]", b"train: &t {tokens: 3, <<: *t}",
        b"train: {tokens: 1, tokens: 2}", b"sae: !!python/object/apply:os.system [true]", b"? [1]\n: 2", b"- 1\n- 2", b"",
        b"\xff\xfe", b"a: \x00",
        b"train: 3\n---\n", b"k: " + b"9" * 5000, b"x" * 5_000_000, b"train: *t", b"sae: !!set {k}",
        b"stream: {model: !!binary aGk=}", b"%YAML 9.9\n---\n{}",
    )  # fmt: skip
    for _ in range(count):
        at = draw.randrange(len(whole))
        yield draw.choice(
            [
                whole[:at],
                whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :],
                whole[:at] + b"\n" + whole[at:],
                *made,
            ]
        )


class Option(NamedTuple):
    """An option or argument of a command: how it is typed, and the kinds of its values (`strict.kinds`)."""

    label: str
    of: frozenset[Any]
    least: float | None
    most: float | None


def options(command: Any) -> list[Option]:
    """What a command of the command line takes, but for flags."""
    found = []
    for param in command.params:
        annotation = command.annotations.get(param.name)
        of = kinds(annotation)
        marks = [mark for mark in getattr(annotation, "__metadata__", ()) if hasattr(mark, "min")]
        if bool not in of and annotation is not None:
            label = next((name for name in param.opts if name.startswith("--")), "")
            found.append(Option(label, of, *((marks[0].min, marks[0].max) if marks else (None, None))))
    return found


def arguments(seed: int, count: int, commands: dict[tuple[str, ...], Any]) -> Iterator[tuple[list[str], str]]:
    """`count` argument lists that can't be, each with the option that is wrong, for the `commands` by name."""
    draw = random.Random(seed)
    names = sorted(commands)
    for _ in range(count):
        name = draw.choice(names)
        own = [option for option in options(commands[name]) if option.label]
        wrong = (
            draw.choice(own)
            if own and draw.random() < 0.9
            else Option("--no-such-option", frozenset({str}), None, None)
        )
        given = [*name, *NEEDED.get(name, ())]
        value = draw.choice(_wrong(wrong))
        yield [*given, wrong.label, value] if value is not None else [*given, wrong.label], wrong.label


def _wrong(option: Option) -> list[str | None]:
    """Values that an option can't have; None: no value."""
    if option.of & {int, float}:
        found = ["", " ", "4 ", "1_000", "٣", "0x10", "four", "1,2", "4\n", "\x1b[31m4", "--", LONG, "9" * 5000, None]
        found += [str(option.least - 1)] if option.least is not None else []
        found += [str(option.most * 2), "9" * 300] if option.most is not None else []
        return found + (["1.5"] if int in option.of else [])
    return ["", "  ", "a\nb", "\x1b[31mred", LONG, "~nouser/x", None]


#: what a command needs before anything else is looked at
NEEDED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("eval",): ("core",),
    ("run",): ("A1",),
    ("plot",): ("nowhere",),
    ("convert",): ("nowhere", "there"),
    ("upload",): ("nowhere", "owner/name"),
    ("bench", "table"): ("nowhere.json",),
}
