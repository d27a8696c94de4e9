"""Plugins: Python files or modules that define the user's own parts.

A plugin is code, so it is imported only if the user names it with --plugin or imports it in Python. A run's config
records its plugins only so that an error can name them: the config may have come from someone else.
"""

import hashlib
import importlib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from .errors import UserError, shown
from .storage.path_names import expand_path

_ALLOWED = "give the path of a .py file or an installed module"


class UnknownPart(UserError):
    """The settings name a part that no imported module defines."""

    def __init__(self, kind: str, hint: str):
        punctuation = "" if hint.endswith("?") else ";"
        advice = "for a part of your own give --plugin FILE (in Python, import it first)"
        super().__init__(f"sae.parts: {shown(kind)} is not known; {hint}{punctuation} {advice}")
        self.kind = kind

    def of(self, plugins: Iterable[str]) -> UserError:
        """Return the error for a dictionary whose config names these plugins."""
        options = " ".join(f"--plugin {shlex.quote(str(plugin))}" for plugin in plugins)
        if not options:
            return self
        return UserError(
            f"sae.parts: {shown(self.kind)} is not known; it was trained with a plugin: give {options} (a plugin is code, "
            "so it runs only if you name it; in Python, import it first)"
        )


def use(plugins: Iterable[str] | None) -> None:
    """Import plugins, each given as the path of a Python file or the name of a module, which registers their parts.

    Raises UserError for a plugin that does not exist or fails, with the failing line.
    """
    for plugin in plugins or ():
        is_file = plugin.endswith(".py") or Path(plugin).is_file() or "/" in plugin or "\\" in plugin
        try:
            _import_file(expand_path(plugin, "plugin")) if is_file else importlib.import_module(plugin)
        except UserError:
            raise
        except Exception as error:  # a plugin may raise anything
            is_missing = isinstance(error, ModuleNotFoundError) and error.name in (plugin, plugin.partition(".")[0])
            if is_missing and not is_file:
                raise UserError(f"plugin: {plugin} is not a module; {_ALLOWED}") from None
            place = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {' '.join(str(error).split())}; {place.filename}, line {place.lineno}"
            raise UserError(f"plugin: {plugin} can't be imported ({message})") from error


def source(cls: type) -> str | None:
    """Return the name under which `use` imports a class again: the absolute path of its file, or its module in a
    package. None if it is not defined in a file, for example in a notebook."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    return module.__name__ if module.__package__ and module.__name__ != "__main__" else str(Path(file).resolve())


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"plugin: {path} does not exist; {_ALLOWED}")
    path = path.resolve()
    name = f"temposae_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin: {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
