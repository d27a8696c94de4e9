"""What all settings have in common, and files of settings that are too much."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError, in_one_line, shown
from temposae.engine.parts import PartSettings
from temposae.engine.storage.yaml_file import read_yaml


class HalfSettings(PartSettings):
    """As a plugin would write them, without ranges."""

    factor: float = 0.5
    count: int = 1
    label: str = "half"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(warmup=False), "train.warmup: False is not allowed; it must be a number"),
        (lambda: StreamConfig(rows_per_forward=True), "stream.rows_per_forward: True is not allowed; it must be an integer"),
        (lambda: TrainConfig(**{"tokens": "1_000"}), "train.tokens: '1_000' is not allowed; it must be an integer"),
        (lambda: TrainConfig(**{"tokens": "4"}), "train.tokens: '4' is not allowed; it must be an integer"),
        (lambda: TrainConfig(**{"lr": "4 "}), "train.lr: '4 ' is not allowed; it must be a number"),
        (lambda: TrainConfig(**{"fp8": 1}), "train.fp8: 1 is not allowed; it must be true or false"),
        (lambda: TrainConfig(lr=-1), "train.lr: -1 is not allowed; it must be a number above 0 and at most 10 or null"),
        (lambda: TrainConfig(**{"self": 3}), "train.self: no such setting"),
        (lambda: MaskConfig(sigma=1e-300), "sae.mask.sigma: 1e-300 is not allowed; it must be 0, or at least 1e-12 in size"),
        (lambda: MaskConfig(sigma=1e19), "sae.mask.sigma: 1e+19 is not allowed; it must be at most 1e+15 in size"),
        (lambda: MaskConfig(temperature=1e5), "sae.mask.temperature: 100000.0 is not allowed; it must be"),
        (lambda: SAEConfig(d_in=8, d_sae=8, k=2, l0_coefficient=1e30), "sae.l0_coefficient: 1e+30 is not allowed"),
        (lambda: StreamConfig(**{"model": None}), "stream.model: None is not allowed; it must be text"),
        (lambda: StreamConfig(**{"cache": 3}), "stream.cache: 3 is not allowed; it must be text"),
        (lambda: StreamConfig(data="a\nb"), r"stream.data: 'a\nb' is not allowed; it must have no line breaks"),
        (lambda: SAEConfig(**{"d_in": 8, "d_sae": 8, "prefixes": {8, 4}}), "sae.prefixes: {8, 4} is not allowed"),
        (lambda: SAEConfig(**{"d_in": 8, "d_sae": 8, "parts": [{"kind": [1]}]}), "sae.parts.kind: [1] is not allowed"),
        (lambda: HalfSettings(kind="half", factor=True), "sae.parts.half.factor: True is not allowed; it must be a number"),
        (lambda: HalfSettings(kind="half", factor=math.inf), "sae.parts.half.factor: inf is not allowed"),
        (lambda: HalfSettings(**{"kind": "half", "label": 3}), "sae.parts.half.label: 3 is not allowed; it must be text"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(message)


def test_a_number_in_exponents_is_one(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for text."""
    assert TrainConfig(**{"lr": "1e-4"}).lr == 1e-4
    (tmp_path / "c.yaml").write_text("train: {lr: 1e-4, tokens: 1e6, batch: 1_024}\nstream: {data: '1e-4'}\n")
    found = read_yaml(tmp_path / "c.yaml")
    assert found == {"train": {"lr": 1e-4, "tokens": 1e6, "batch": 1024}, "stream": {"data": "1e-4"}}
    assert TrainConfig(**found["train"]).tokens == 1_000_000


def test_off_and_auto_are_kept() -> None:
    assert [StreamConfig(**{"max_norm": given}).max_norm for given in ("auto", "off", False, None, 8)] == [
        "auto", None, None, None, 8.0,
    ]  # fmt: skip


def test_anchors_and_merged_sections_work(tmp_path: Path) -> None:
    text = "base: &b {x: 1, y: 2}\nz: &z\n  <<: *b\n  x: 3\nlist: [*z, *z]\n010: 010\nyes: 1:30\n"
    (tmp_path / "c.yaml").write_text(text)
    z = {"y": 2, "x": 3}
    assert read_yaml(tmp_path / "c.yaml") == {
        "base": {"x": 1, "y": 2}, "z": z, "list": [z, z], "010": "010", "yes": "1:30",
    }  # fmt: skip


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 6, column 26: it is too large; written out, settings have at most 400,000 values"),
        ("a: &a [*a]", "line 1, column 8: *a refers to itself"),
        ("[" * 100_000, "line 1, column 33: it is nested too deeply; settings have at most 32 levels"),
        ("a: 1\nb: {c: 1, 'c': 2}", "line 2, column 11 is not YAML: c comes twice in its section"),
        ("a: !!python/object/apply:os.system [x]", "line 1, column 4: the tag tag:yaml.org,2002:python/object"),
        ("a: *b", "line 1, column 4: *b names nothing"),
        ("x: " + "y" * 5_000_000, "is too large; settings are at most 4,194,304 bytes"),
        ("a: \x07", "is not YAML: line 1 has a character that is not allowed in text"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1 is not YAML: expected a single document"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_is_too_much_is_refused_before_it_is_built(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "c.yaml")
    assert time.monotonic() - began < 10
    assert message in str(error.value)
    assert str(error.value).startswith(f"config: {tmp_path / 'c.yaml'}")


def test_messages_are_one_short_line() -> None:
    assert str(UserError("a\nb\x1b[31m\u202e")) == r"a\nb\x1b[31m\u202e"
    assert len(in_one_line("x" * 5000)) == 300
    assert len(shown("x" * 5000)) == len(shown(["x"] * 5000)) == 200
    assert shown(10**5000) == "a number of thousands of digits"
