"""Parts of one's own: named by --plugin or imported, never run because a folder names them."""

import shutil
from pathlib import Path

import pytest
import temposae as ts
import yaml
from temposae.engine import plugins, registry
from temposae.engine.errors import UserError
from temposae.engine.storage.run_folder import read_settings

from .commandline import run

OWN = """
from pathlib import Path
import temposae as ts

with Path({mark!r}).open("a") as file:
    file.write("run ")

@ts.part("half")
class Half(ts.Part):
    def acts(self, acts, batch):
        return acts / 2
"""
CONFIG = {
    "stream": {"model": "testbed", "context": 32, "buffer_tokens": 2048},
    "sae": {"d_sae": 32, "k": 4, "parts": [{"kind": "half"}]},
    "train": {"tokens": 2048, "batch": 512},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A plugin that notes each time it is run, in a process that has not seen it."""
    registry.find("layer_norm")  # ours are known from here on
    path = tmp_path / "my part.py"
    path.write_text(OWN.format(mark=str(tmp_path / "mark")))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))
    yield path
    forget()


def forget() -> None:
    """As in a new process."""
    registry._PARTS.pop("half", None)
    for name in [name for name in plugins.sys.modules if name.startswith(("temposae_plugin_", "lab_parts"))]:
        del plugins.sys.modules[name]


def times_run(folder: Path) -> int:
    mark = folder / "mark"
    return len(mark.read_text().split()) if mark.is_file() else 0


@pytest.fixture
def trained(own, tmp_path, monkeypatch):
    """A run folder made with the plugin, on the command line."""
    from temposae.engine.stream import ActivationStream

    run_config = ts.RunConfig  # trained in Python: measuring would take its time
    plugins.use([str(own)])
    stream = ActivationStream(ts.StreamConfig(**CONFIG["stream"]))
    config = run_config(sae={"d_in": stream.d_in, **CONFIG["sae"]}, train=CONFIG["train"])
    ts.train(stream, config.sae, config.train, out=tmp_path / "run")
    forget()
    (tmp_path / "mark").unlink()
    return tmp_path / "run"


def test_an_unknown_part_says_what_is_needed(own):
    code, _, err = run("train", "own.yaml", "--out", "fresh")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: sae.parts: 'half' is not known; there are adaptive_weights, ")
    assert "for a part of your own give --plugin FILE" in err
    assert not Path("fresh").exists()


def test_a_config_never_runs_code_and_the_line_says_what_to_give(trained, own, tmp_path):
    assert yaml.safe_load((trained / "config.yaml").read_text())["plugins"] == [str(own)]
    for argv in (
        ("eval", "core", "--sae", trained), ("features", "--sae", trained, "--out", "store", "--tokens", "100"),
        ("dashboard", "--sae", trained), ("convert", trained, "copy", "--to", "temposae"),
        ("train", "--resume", "--out", trained),
    ):  # fmt: skip
        code, _, err = run(*argv)
        assert (code, err.count("\n")) == (2, 1), argv
        assert f"--plugin '{own}'" in err, argv
    with pytest.raises(UserError, match="--plugin"):
        ts.load(trained)
    assert times_run(tmp_path) == 0


def test_named_again_it_is_found(trained, own, tmp_path):
    code, _, err = run("convert", trained, "copy", "--to", "temposae", "--plugin", own)
    assert (code, err) == (0, "")
    assert times_run(tmp_path) == 1
    sae = ts.load(trained)  # it is imported now
    assert sae.cfg.parts == ({"kind": "half"},)
    forget()
    code, out, err = run("train", "--resume", "--out", trained, "--plugin", own)
    assert code == 0, err
    assert "run folder" in out


def test_it_is_found_where_it_lies_now(trained, own, tmp_path):
    shutil.move(own, tmp_path / "moved.py")
    plugins.use([str(tmp_path / "moved.py")])
    assert read_settings(trained).plugins == (str(tmp_path / "moved.py"),)


def test_a_module_is_named_by_its_name(own, tmp_path, monkeypatch):
    package = tmp_path / "lab_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(own, package / "half.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.use(["lab_parts.half"])
    config = ts.RunConfig(sae={"d_in": 8, "d_sae": 32, "k": 4, "parts": [{"kind": "half"}]})
    assert config.plugins == ("lab_parts.half",)
    assert ts.RunConfig(sae={"d_in": 8, "d_sae": 32, "parts": [{"kind": "layer_norm"}]}).plugins == ()


BROKEN = {
    "does not exist": ("nowhere.py", ("plugin: nowhere.py does not exist",)),
    "is no module": ("no_such_module", ("plugin: no_such_module is not a module", ".py file")),
    "fails": ("fails.py", ("plugin: fails.py can't be imported", "ZeroDivisionError", "line 2")),
    "is not Python": ("syntax.py", ("plugin: syntax.py can't be imported", "SyntaxError", "line 1")),
    "lacks a module": ("lacks.py", ("plugin: lacks.py can't be imported", "no_such_thing", "line 1")),
    "has a name of ours": ("ours.py", ("sae.parts: layer_norm is temposae's own", "needs another name")),
}


@pytest.mark.parametrize(("name", "words"), BROKEN.values(), ids=BROKEN)
def test_a_plugin_that_cannot_be(name, words, own):
    Path("fails.py").write_text("a = 0\n1 / a\n")
    Path("syntax.py").write_text("def (\n")
    Path("lacks.py").write_text("import no_such_thing\n")
    Path("ours.py").write_text('import temposae as ts\n\n@ts.part("layer_norm")\nclass Mine(ts.Part):\n    pass\n')
    code, _, err = run("train", "own.yaml", "--out", "fresh", "--plugin", name)
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in words), err
