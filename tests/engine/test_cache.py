"""The disk cache: what is written is what the model gives, whole after any interruption, and checked when it is read."""

import errno
import json
import os
import random
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage.run_folder import CONFIG
from temposae.engine.stream import ActivationStream, Batch, cache
from temposae.engine.stream.cache import MANIFEST, CacheSource, read_manifest
from temposae.engine.stream.cache_writer import write_cache
from temposae.engine.stream.model_source import special_tokens
from temposae.engine.stream.token_rows import TextRows
from temposae.engine.sweep import expand, resolve
from temposae.engine.train import train

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
MODES = ("tokens", "grouped", "sequences")
CONTEXT = 64
TOKENS = 24_000
SHARD_MB = 3  # of about 5600 tokens, and with them more than one block


@pytest.fixture(scope="module")
def write(testbed, texts):
    """write(folder, **options): a cache of those documents at both hooks."""

    def make(folder: Path, tokens: int = TOKENS, hooks=HOOKS, stream=None, **options):
        rows = TextRows(texts, testbed.tokenizer, CONTEXT, repeat=False, name="texts")
        config = StreamConfig(**{"context": CONTEXT, "rows_per_forward": 16, "packing": False, **(stream or {})})
        return write_cache(
            folder, config, tokens, hooks=hooks, model=testbed, rows=rows, **{"shard_mb": SHARD_MB, **options}
        )

    yield make
    testbed.use(layers=[1])


@pytest.fixture(scope="module")
def made(write, tmp_path_factory) -> Path:
    """A whole cache, not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "made"
    write(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / shard.file) for shard in read_manifest(folder).shards]


def stored(folder: Path) -> Batch:
    found = shards(folder)
    return Batch.from_tensors({key: torch.cat([shard[key] for shard in found]) for key in found[0]})


def everything(source: CacheSource) -> Batch:
    """One epoch of a source that ends."""
    found = []
    while (batch := source.next()) is not None:
        found.append(batch.tensors())
    return Batch.from_tensors({key: torch.cat([part[key] for part in found]) for key in found[0]})


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(value, two.tensors()[key]) for key, value in one.tensors().items())


# --- what is written


def test_shards_hold_the_text_in_order_with_the_model_s_activations(made, testbed, texts):
    manifest, found = read_manifest(made), stored(made)
    assert len(manifest.shards) >= 4
    assert manifest.complete
    assert {key: (value.dtype, value.shape[1:]) for key, value in shards(made)[0].items()} == {
        **{f"acts.{hook}": (torch.bfloat16, (128,)) for hook in HOOKS},
        **{"pos": (torch.int32, ()), "token": (torch.int32, ()), "kept": (torch.bool, ())},
        **{"document": (torch.int64, ()), "row": (torch.int64, ())},
    }
    rows = TextRows(texts, testbed.tokenizer, CONTEXT, repeat=False).next(int(found.row.unique().numel()))
    text = torch.arange(CONTEXT) < rows.length[:, None]
    assert torch.equal(found.token.long(), rows.tokens[text])
    assert torch.equal(found.document, rows.document[text])
    assert torch.equal(found.row, rows.row[:, None].expand(text.shape)[text])
    assert torch.equal(found.pos.long(), torch.arange(CONTEXT).expand(text.shape)[text])
    assert torch.equal(found.kept, ~torch.isin(rows.tokens[text], special_tokens(testbed.tokenizer)))
    testbed.use(hooks=HOOKS)
    for hook in HOOKS:
        expected = torch.cat([testbed.harvest(tokens)[hook] for tokens in rows.tokens.split(16)])[text].bfloat16()
        assert torch.equal(found.acts[hook], expected)  # the same forward passes, bit for bit


def test_it_ends_with_the_forward_pass_that_reaches_the_number_of_tokens(made):
    found, manifest = stored(made), read_manifest(made)
    last = found.row.unique()[-16:][0]  # the rows of the last pass
    before = int((found.kept & (found.row < last)).sum())
    assert before < TOKENS <= int(found.kept.sum()) == manifest.tokens
    assert sum(shard.kept for shard in manifest.shards) == manifest.tokens
    assert sum(shard.rows for shard in manifest.shards) == len(found.row.unique())


def test_blocks_and_shards_hold_whole_rows(made):
    rows: list[set[int]] = []
    for shard, found in zip(read_manifest(made).shards, shards(made), strict=True):
        parts = found["row"].tensor_split(shard.ends[:-1])
        assert all(len(part) >= cache.BLOCK // 2 for part in parts)
        assert len(parts) >= 1
        rows += [set(part.tolist()) for part in parts]
    assert len(rows) > len(shards(made))
    assert sum(map(len, rows)) == len(set().union(*rows))


def test_a_text_that_ends_sooner_gives_what_it_has(write, tmp_path, testbed, texts):
    manifest = write(tmp_path / "cache", tokens=10**7)
    assert manifest.complete
    rows = TextRows(texts, testbed.tokenizer, CONTEXT, repeat=False).next(10**6)
    assert len(stored(tmp_path / "cache")) == int(rows.length.sum())
    assert not (stored(tmp_path / "cache").row % 20 == 19).any()  # the held-out rows


def test_activations_can_be_kept_in_float32(write, tmp_path, made):
    write(tmp_path / "cache", tokens=2000, dtype="float32")
    whole, narrow = stored(tmp_path / "cache"), stored(made)
    assert whole.acts[HOOKS[0]].dtype == torch.float32
    for hook in HOOKS:
        assert torch.equal(whole.acts[hook].bfloat16(), narrow.acts[hook][: len(whole)])
        assert not torch.equal(whole.acts[hook], narrow.acts[hook][: len(whole)].float())


# --- interruptions


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_killed_anywhere_and_resumed_leaves_the_same_files(write, made, tmp_path, monkeypatch, seed):
    """Stopped at random calls to the operating system, with nothing cleaned up behind, until it gets to its end."""
    chance, folder, kills = random.Random(seed), tmp_path / "cache", 0
    real = {name: getattr(os, name) for name in ("replace", "fsync")}

    def deadly(name):
        def call(*args):
            after = chance.random() < 0.5
            if chance.random() < 0.25:
                if after:
                    real[name](*args)
                raise Killed
            return real[name](*args)

        return call

    while True:
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, deadly(name))
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: os.unlink(path) if not missing_ok else None)
            try:
                write(folder, resume=folder.exists())
                break
            except Killed:
                kills += 1
                if (folder / MANIFEST).exists() and read_manifest(folder).shards:
                    assert len(everything(CacheSource(folder, repeat=False)))  # valid at any moment
    assert kills
    assert files(folder) == files(made)
    assert write(folder, resume=True).complete  # nothing more to do
    assert files(folder) == files(made)


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7])
def test_a_full_disk_is_named_and_what_was_written_stays(write, made, tmp_path, monkeypatch, at):
    folder, real, calls = tmp_path / "cache", os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out: .* can't be written \(No space left on device\).*--resume") as error:
        write(folder)
    assert len(str(error.value).splitlines()) == 1
    assert not folder.exists() or not [name for name in files(folder) if name.startswith(".")]
    if at > 6:  # two calls for cache.json, two for a shard, two for cache.json again
        found = everything(CacheSource(folder, repeat=False))
        assert len(found)
    write(folder, resume=True)
    assert files(folder) == files(made)


def test_a_small_disk_that_fills_up(write, made, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(UserError, match=r"out: .*shard_\d+.* can't be written \(.*No space left on device.*\)"):
            write(disk / "cache")
        names = [shard.file for shard in read_manifest(disk / "cache").shards]
        assert names
        assert set(files(disk / "cache")) == {*names, MANIFEST}
        for name in names:
            assert (disk / "cache" / name).read_bytes() == (made / name).read_bytes()
        assert len(everything(CacheSource(disk / "cache", repeat=False)))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 5}, ("tokens 5", f"began with {TOKENS}")),
        ({"hooks": HOOKS[:1]}, ("hooks", HOOKS[1])),
        ({"hooks": HOOKS[::-1]}, ("hooks",)),
        ({"dtype": "float32"}, ("dtype float32", "bfloat16")),
        ({"shard_mb": 7}, ("shard_mb 7", "3")),
        ({"seed": 3}, ("seed 3", "0")),
        ({"stream": {"rows_per_forward": 8}}, ("stream.rows_per_forward 8", "16")),
        ({"stream": {"data": "other.txt"}}, ("stream.data other.txt",)),
    ],
)
def test_resuming_with_other_settings_is_refused(write, made, options, words):
    before = files(made)
    with pytest.raises(UserError, match="resume: ") as error:
        write(made, resume=True, **options)
    assert [word for word in words if word not in str(error.value)] == []
    assert files(made) == before


def test_a_folder_that_holds_anything_else_is_refused(write, made, copy, tmp_path):
    with pytest.raises(UserError, match=r"out: .*not empty; --resume goes on"):
        write(made)
    (copy / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"out: .* holds thesis.tex, which is no part of a cache"):
        write(copy, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "shard_00007.safetensors").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="out: "):
            write(other, resume=resume)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"out: .*file is not a folder"):
        write(tmp_path / "file")
    assert files(other) == {"shard_00007.safetensors": b"x"}


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("shard_mb", 0), ("shard_mb", float("nan"))])
def test_numbers_that_make_no_sense_are_named(write, tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name}: {value} is not allowed; it must be"):
        write(tmp_path / "cache", **{name: value})


# --- damage


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


@pytest.mark.parametrize("name", [*(f"acts.{hook}" for hook in HOOKS), "pos", "token", "document", "row", "kept"])
@pytest.mark.parametrize("where", [0.0, 0.7, 1.0])
def test_one_flipped_bit_in_any_tensor_is_found(copy, name, where):
    path = copy / "shard_00002.safetensors"
    begin, end = tensor_bytes(path, name)
    raw = bytearray(path.read_bytes())
    raw[min(end - 1, int(begin + where * (end - begin)))] ^= 1
    path.write_bytes(raw)
    source = CacheSource(copy, repeat=False)
    with pytest.raises(UserError, match=rf"cache: .*shard_00002.safetensors is damaged in block \d+ \({name}\)"):
        everything(source)


def test_the_damaged_block_is_the_one_named(copy):
    shard = read_manifest(copy).shards[1]
    begin, end = tensor_bytes(copy / shard.file, "token")
    for block in range(len(shard.ends)):
        raw = bytearray((copy / shard.file).read_bytes())
        raw[begin + 4 * (shard.ends[block] - 1)] ^= 128
        (copy / shard.file).write_bytes(raw)
        with pytest.raises(UserError, match=rf"damaged in block {block} \(token\)"):
            CacheSource(copy)._read(1, block)
        raw[begin + 4 * (shard.ends[block] - 1)] ^= 128
        (copy / shard.file).write_bytes(raw)
    assert end - begin == 4 * shard.tokens


def test_hooks_that_are_not_read_are_not_checked(copy):
    path = copy / "shard_00000.safetensors"
    begin, _ = tensor_bytes(path, f"acts.{HOOKS[1]}")
    raw = bytearray(path.read_bytes())
    raw[begin] ^= 1
    path.write_bytes(raw)
    assert set(everything(CacheSource(copy, hooks=HOOKS[:1], repeat=False)).acts) == {HOOKS[0]}


def test_a_shard_of_another_size_or_header_or_none_is_named_at_opening(copy):
    path = copy / "shard_00001.safetensors"
    whole = path.read_bytes()
    for damaged, words in (
        (whole[:-1], rf"it has {len(whole) - 1} bytes, not {len(whole)}"),
        (b"", "it has 0 bytes"),
        (whole + b"x", "bytes, not"),
        (whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], "damaged in its header"),
        (b"\xff" * 8 + whole[8:], "damaged in its header"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"cache: .*shard_00001.safetensors.*{words}"):
            CacheSource(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"cache: .*shard_00001.safetensors is missing"):
        CacheSource(copy)


def test_a_shard_cut_or_removed_while_it_is_in_use_is_named(copy):
    first, second = CacheSource(copy, repeat=False), CacheSource(copy, repeat=False)
    os.truncate(copy / "shard_00000.safetensors", 1000)
    with pytest.raises(UserError, match=r"cache: .*shard_00000.safetensors has been cut since it was opened"):
        everything(first)
    (copy / "shard_00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"cache: .*shard_00000.safetensors can't be read \(No such file"):
        everything(second)


def test_a_cut_or_foreign_manifest_is_named(copy, tmp_path):
    path = copy / MANIFEST
    whole = path.read_text()
    manifest = json.loads(whole)
    del manifest["sha256"]
    for cut in (0, 1, 30, 500, len(whole) // 2, len(whole) - 3):
        path.write_text(whole[:cut])
        with pytest.raises(UserError, match=r"cache: .*cache.json is damaged"):
            CacheSource(copy)
    for packing, read in ((False, True), (True, False)):  # as an earlier version wrote them
        earlier = manifest | {"format": "temposae-cache/1"}
        path.write_text(json.dumps(earlier | {"stream": earlier["stream"] | {"packing": packing}}))
        with nullcontext() if read else pytest.raises(UserError, match="has format 'temposae-cache/1'"):
            CacheSource(copy)
    for foreign in ("[]", "3"):
        path.write_text(foreign)
        with pytest.raises(UserError, match=r"cache: .*cache.json is damaged: it holds a"):
            CacheSource(copy)
    for foreign in ("{}", '{"format": "temposae/1"}'):
        path.write_text(foreign)
        with pytest.raises(UserError, match=r"cache: .*cache.json has format .*; this version reads temposae-cache/2"):
            CacheSource(copy)
    for key, value in (("hooks", 3), ("shards", 5), ("dtype", "int8"), ("more", 1)):
        path.write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(UserError, match=rf"cache: .*cache.json is damaged \(.*{key}"):
            CacheSource(copy)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cache: .*cache.json is damaged"):
        CacheSource(copy)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"cache: .* holds no cache.json"):
            CacheSource(folder)


# --- what is read


def test_an_epoch_gives_every_token_once_in_an_order_of_its_own(made):
    source, whole = CacheSource(made, seed=1), stored(made)
    count = len(source._blocks)
    epochs = []
    for epoch in range(3):
        parts = [source.next().tensors() for _ in range(count)]
        found = Batch.from_tensors({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        assert source.counts == {
            "rows": (epoch + 1) * len(whole.row.unique()), "tokens": (epoch + 1) * len(whole), "epoch": epoch,
        }  # fmt: skip
        order = (found.row * CONTEXT + found.pos).argsort()
        assert equal(found[order], whole)
        epochs.append(found.row)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert torch.equal(CacheSource(made, seed=1).next().row, epochs[0][: len(CacheSource(made, seed=1).next())])
    orders = {tuple(CacheSource(made, seed=seed)._order) for seed in range(5)}
    assert len(orders) == 5


def test_blocks_of_all_shards_come_mixed(made):
    source = CacheSource(made)
    first = [source._blocks[i][0] for i in source._order]
    assert first != sorted(first)


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_activations_are_what_they_say(made, testbed, texts, mode):
    """Run the model on the stated row: at the stated position are the stated token, document and activation."""
    config = StreamConfig(cache=str(made), mode=mode, buffer_tokens=4096)
    stream = ActivationStream(config, model=testbed, hooks=HOOKS)
    flat = [stream.next(1024).flat().clone().tensors() for _ in range(14)]
    served = Batch.from_tensors({key: torch.cat([one[key] for one in flat]) for key in flat[0]})
    pick = torch.randperm(len(served), generator=torch.Generator().manual_seed(0))[:10_000]
    assert len(pick) == 10_000
    served = served[pick]
    rows = TextRows(texts, testbed.tokenizer, CONTEXT).next(1000)
    place = torch.full((int(rows.row.max()) + 1,), -1).scatter_(0, rows.row, torch.arange(1000))[served.row]
    assert int(place.min()) >= 0  # a training row
    pos = served.pos.long()
    assert torch.equal(rows.tokens[place, pos].int(), served.token)
    assert torch.equal(rows.document[place, pos], served.document)
    assert not torch.isin(served.token, stream.source.special).any()
    used = place.unique()
    testbed.use(hooks=HOOKS)
    known = {hook: torch.cat([testbed.harvest(t)[hook] for t in rows.tokens[used].split(16)]) for hook in HOOKS}
    for hook in HOOKS:
        expected = known[hook][torch.searchsorted(used, place), pos].bfloat16()
        assert torch.allclose(served.acts[hook].float(), expected.float(), rtol=2**-7, atol=1e-3)
        assert (served.acts[hook] == expected).float().mean() > 0.99
    assert len(pos.unique()) == 63


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("served", [0, 1, 30], ids="served{}".format)
def test_a_state_goes_on_where_it_was_taken(made, testbed, mode, served):
    def fresh() -> ActivationStream:
        return ActivationStream(StreamConfig(cache=str(made), mode=mode, buffer_tokens=4096), model=testbed, seed=5)

    stream, other = fresh(), fresh()
    for _ in range(served):
        stream.next(900)
    state = {key: value.clone() for key, value in stream.state().items()}
    expected = [stream.next(900).clone() for _ in range(40)]  # into another epoch
    other.next(999)
    other.load_state(state)
    assert all(equal(batch, other.next(900)) for batch in expected)
    assert stream.counts == other.counts
    assert stream.counts["epoch"] > 0


def test_another_cache_cannot_be_gone_on_with(made, write, tmp_path, testbed):
    write(tmp_path / "cache", tokens=9000)
    state = CacheSource(made).state()
    with pytest.raises(UserError, match=r"stream.cache: .* is not the cache that the run was trained on"):
        CacheSource(tmp_path / "cache").load_state(state)


def test_without_repeat_the_stream_ends(made, testbed):
    stream = ActivationStream(StreamConfig(cache=str(made), repeat=False, buffer_tokens=4096), model=testbed)
    total = 0
    while len(batch := stream.next(1000)):
        total += len(batch)
    assert total == int(stored(made).kept.sum())
    assert stream.counts["special"] == int((~stored(made).kept).sum())


def test_special_tokens_and_norms_are_filtered_as_ever(made, testbed):
    whole = ActivationStream(StreamConfig(cache=str(made), drop_special=False, buffer_tokens=4096), model=testbed)
    assert torch.isin(whole.next(2000).token, whole.source.special).any()
    assert whole.counts["special"] == 0
    narrow = ActivationStream(StreamConfig(cache=str(made), max_norm=1.1, buffer_tokens=4096), model=testbed)
    narrow.next(100)
    assert narrow.counts["high_norm"] > 0


def test_neither_model_nor_text_is_loaded_before_it_is_needed(made, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    for name in ("LanguageModel", "open_text"):
        monkeypatch.setattr(f"temposae.engine.stream.{name}", never)
    monkeypatch.setattr("temposae.engine.sweep.LanguageModel", never)
    settings = {"stream": {"cache": str(made)}, "train": {"tokens": 2048, "batch": 256}, "sweep": {"hook": list(HOOKS)}}
    lm, runs = resolve(expand({**settings, "sae": {"d_sae": 64, "k": 4}}))
    assert lm is None
    assert {run.stream.hook for run in runs.values()} == set(HOOKS)
    assert {run.stream.context for run in runs.values()} == {CONTEXT}
    stream = ActivationStream(next(iter(runs.values())).stream, hooks=HOOKS)
    train(stream, SAEConfig(d_in=128, d_sae=64, k=4), TrainConfig(tokens=2048, batch=256))
    with pytest.raises(AssertionError):
        stream.model  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 32}, ("stream.context: 32", "made with context 64")),
        ({"model": "smollm2"}, ("stream.model: smollm2", "made with model testbed")),
        ({"data": "other.txt"}, ("stream.data: other.txt", "made with data None")),
        ({"bos": False}, ("stream.bos: False", "made with bos None")),
        ({"hook": "blocks.3.hook_resid_post"}, ("stream.hook: blocks.3.hook_resid_post", *HOOKS)),
    ],
)
def test_settings_that_contradict_the_cache_are_named(made, settings, words):
    config = StreamConfig(cache=str(made), **settings)
    with pytest.raises(UserError) as error:
        ActivationStream(config)
    assert [word for word in (*words, str(made)) if word not in str(error.value)] == []
    with pytest.raises(UserError, match=r"layer: 3 is not allowed; the cache .* has"):
        resolve({"": {"stream": {"cache": str(made), "layer": 3}}})


def test_the_settings_of_a_run_go_on(made, tmp_path):
    """Those in config.yaml, which names everything, contradict nothing."""
    stream = ActivationStream(StreamConfig(cache=str(made), hook=HOOKS[1], buffer_tokens=4096))
    sae, config = SAEConfig(d_in=128, d_sae=64, k=4), TrainConfig(tokens=2048, batch=256)
    train(stream, sae, config, out=tmp_path / "run")
    found = RunConfig(**yaml.safe_load((tmp_path / "run" / CONFIG).read_text()))
    assert ActivationStream(found.stream).config == found.stream == stream.config
    assert resolve({"": found.model_dump()})[1][""] == found


def test_a_run_from_a_cache_resumes_to_the_same_weights(made, tmp_path, monkeypatch):
    def fresh() -> ActivationStream:
        return ActivationStream(StreamConfig(cache=str(made), buffer_tokens=4096), seed=2)

    sae = SAEConfig(d_in=128, d_sae=64, k=4)
    config = TrainConfig(tokens=30_000, batch=512, checkpoint_every_steps=7, log_every_steps=10)
    whole = train(fresh(), sae, config, out=tmp_path / "whole")
    stream = fresh()
    real, calls = stream.next, 0

    def killed(n):
        nonlocal calls
        calls += 1
        if calls > 47:
            raise Killed
        return real(n)

    monkeypatch.setattr(stream, "next", killed)
    with pytest.raises(Killed):
        train(stream, sae, config, out=tmp_path / "run")
    again = train(fresh(), sae, config, out=tmp_path / "run", resume=True)
    for key, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[key]), key
    assert [line["loss"] for line in whole.metrics] == [line["loss"] for line in again.metrics]


def test_training_learns_as_from_the_model_itself(made, testbed, texts):
    """The same activations, in another order: losses of the same size, far from those of the control."""
    sae, config = SAEConfig(d_in=128, d_sae=128, k=8), TrainConfig(tokens=20_000, batch=512)
    rows = TextRows(texts, testbed.tokenizer, CONTEXT)
    settings = {"buffer_tokens": 8192}
    live = ActivationStream(
        StreamConfig(context=CONTEXT, rows_per_forward=16, **settings), model=testbed, rows=rows, hooks=HOOKS[:1]
    )
    cached = ActivationStream(StreamConfig(cache=str(made), **settings), hooks=HOOKS[:1])
    one, two = (train(stream, sae, config).metrics[-1] for stream in (live, cached))
    assert two["fvu"] == pytest.approx(one["fvu"], rel=0.15)
    assert two["random"]["fvu"] > 1.5 * two["fvu"]
