"""Where parts come from: temposae's own and those of other packages by entry points, all others as plugins."""

import sys
from importlib.metadata import EntryPoint

import pytest
from temposae.engine import registry
from temposae.engine.config import RunConfig, SAEConfig
from temposae.engine.errors import UserError

LAB = """
import temposae as ts

@ts.part("{kind}")
class Half(ts.Part):
    pass
"""


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """packages(**{{"entry point": "module"}}): as if these alone were installed, in a process that has not looked yet."""
    registry.find("layer_norm")  # temposae's own are imported from here on
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))
    monkeypatch.setattr(registry, "_ENTRY_POINTS", {})
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(**modules: str) -> None:
        points = [EntryPoint(name, module, registry.GROUP) for name, module in modules.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_parts"]:
        del sys.modules[name]


def settings(kind: str) -> SAEConfig:
    return SAEConfig(d_in=8, d_sae=16, k=2, parts=[{"kind": kind}])


def lab(tmp_path, kind: str) -> None:
    """A package whose entry point imports the part from another of its modules."""
    (tmp_path / "lab_parts").mkdir()
    (tmp_path / "lab_parts/__init__.py").write_text("")
    (tmp_path / "lab_parts/half.py").write_text(LAB.format(kind=kind))
    (tmp_path / "lab_parts/entry.py").write_text("from . import half\nfrom temposae import variants\n")


def test_parts_of_installed_packages_need_no_plugin(packages, tmp_path):
    lab(tmp_path, "lab_half")
    packages(lab="lab_parts.entry", temposae="temposae.variants")
    assert RunConfig(sae=settings("lab_half")).plugins == ()
    assert RunConfig(sae=settings("layer_norm")).plugins == ()
    assert registry.is_own(registry.find("layer_norm"))
    assert not registry.is_own(registry.find("lab_half"))


def test_own_parts_are_those_of_the_entry_point_even_if_they_were_imported_before(packages):
    packages(temposae="temposae.variants")
    assert registry._ENTRY_POINTS == {}
    assert {kind for kind, cls in registry.installed().items() if registry.is_own(cls)} >= {"layer_norm", "pruning"}


def test_a_package_cannot_take_the_name_of_an_own_part(packages, tmp_path):
    lab(tmp_path, "layer_norm")
    packages(lab="lab_parts.entry", temposae="temposae.variants")
    with pytest.raises(UserError, match="layer_norm is temposae's own; lab_parts.half.Half needs another name"):
        registry.find("lab_half")


def test_without_its_entry_point_temposae_says_what_to_do(packages):
    packages()
    with pytest.raises(UserError) as error:
        settings("no_such_part")
    assert str(error.value).startswith(
        "sae.parts: 'no_such_part' is not known; temposae's own parts are not registered"
    )
    assert "pip install -e ." in str(error.value)
