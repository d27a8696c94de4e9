"""Small files that results depend on: a changed byte is named, and files without a checksum are read as they are."""

import json
import random

import pytest
import yaml
from temposae.engine.errors import UserError
from temposae.engine.storage.sealed import check_yaml, read_json, sealed_yaml, write_json

VALUES = {"format": "ours/1", "step": 12, "files": {"a": {"bytes": 3}}, "text": "Zürich", "share": 0.25}
KEYS = {"step": int, "files": dict}


def read(path):
    return read_json(path, "checkpoint", "make it again", form="ours/1", keys=KEYS)


def test_what_is_written_is_read_and_is_json_to_anyone(tmp_path):
    write_json(tmp_path / "a.json", VALUES)
    assert read(tmp_path / "a.json") == VALUES
    held = json.loads((tmp_path / "a.json").read_text())
    assert len(held.pop("sha256")) == 64
    assert held == VALUES
    write_json(tmp_path / "empty.json", {})
    assert read_json(tmp_path / "empty.json", "checkpoint", "make it again") == {}
    assert len(json.loads((tmp_path / "empty.json").read_text())) == 1


def test_a_file_without_a_checksum_is_read_as_it_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(VALUES))
    assert read(tmp_path / "a.json") == VALUES


def test_every_flipped_bit_and_every_cut_is_named_or_harmless(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, VALUES)
    whole, said = path.read_bytes(), []
    flips = [(at, bit) for at in range(len(whole)) for bit in (0, 5)]
    for at, bit in flips:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            assert {key: value for key, value in read(path).items() if key in VALUES} == VALUES
        except UserError as error:
            said.append(str(error))
    assert all(str(path) in one and (one.endswith("; make it again") or "has format" in one) for one in said)
    assert len(said) > 0.99 * len(flips)  # the rest are white space before the checksum
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            read(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "holds a list, not an object"),
        ('{"format": "theirs/2"}', "has format 'theirs/2'; this version reads ours/1"),
        ('{"format": "ours/1", "files": {}}', "has no step"),
        ('{"format": "ours/1", "step": "12", "files": {}}', "its step is a str"),
        ('{"step": 1', "line 1, column 11"),
        ("[" * 100_000, "nested too deeply"),
        ("\x00", "line 1, column 1"),
    ],
)
def test_what_is_no_such_file_is_named(tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.json")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_one_of_other_bytes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"a.json is missing; make it again"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        read(tmp_path / "a.json")


def test_yaml_with_a_checksum_is_yaml_to_anyone_and_a_change_is_named(tmp_path):
    path, text = tmp_path / "config.yaml", yaml.safe_dump({"train": {"lr": 0.001, "tokens": 5000}})
    path.write_text(sealed_yaml(text))
    check_yaml(path, "resume", "undo it")
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(text)
    whole, draw = path.read_bytes(), random.Random(0)
    start = whole.index(b"\n") + 1
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(start, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"config.yaml has changed since it was written .*; undo it"):
            check_yaml(path, "resume", "undo it")
    path.write_text(text)
    check_yaml(path, "resume", "undo it")  # a person's own
