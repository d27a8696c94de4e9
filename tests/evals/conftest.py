"""SAEBench's own modules, for tests that compare our evals with its functions."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

NAMES = {
    "sae_lens": ("SAE",),
    "sae_lens.loading": (),
    "sae_lens.loading.pretrained_saes_directory": ("get_pretrained_saes_directory",),
    "sae_lens.saes": (),
    "sae_lens.saes.sae": ("SAEMetadata",),
    "sae_lens.training": (),
    "sae_lens.training.activations_store": ("ActivationsStore",),
    "tabulate": ("tabulate",),
}


#: modules of SAEBench that were imported with the stand-ins; a second import would make other classes of the same names
LOADED: dict[str, ModuleType] = {}


def _stand_in(name: str, members: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    module.__path__, module.__spec__ = [], ModuleSpec(name, None)
    for member in members:
        setattr(module, member, type(member, (dict,), {}))
    return module


STAND_INS = {name: _stand_in(name, members) for name, members in NAMES.items()}


@pytest.fixture(scope="module")
def saebench():
    """saebench("evals.core.main"): a module of SAEBench, which is installed without what it needs besides; of SAELens it
    needs names only."""
    pytest.importorskip("sae_bench", reason="pip install --no-deps sae-bench")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (STAND_INS | LOADED).items():
            patch.setitem(sys.modules, name, module)
        before = set(sys.modules)
        yield lambda name: importlib.import_module(f"sae_bench.{name}")
        for name in set(sys.modules) - before:
            if name.startswith("sae_bench."):
                LOADED[name] = sys.modules.pop(name)  # it holds our stand-ins
