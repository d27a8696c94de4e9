"""Plugins: Python files or modules with parts of one's own.

A plugin is code. It is imported only where the user names it: by --plugin, or by importing it in Python. A run's config
says which plugin its parts came from, so that a message can tell what to give; a name found in a config, which may have come
from someone else, is never imported.
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


class UnknownPart(UserError):
    """A part that nothing imported so far defines."""

    def __init__(self, kind: str, hint: str):
        super().__init__(
            f"sae.parts: {shown(kind)} is not known; {hint}{'' if hint.endswith('?') else ';'} a part of one's own needs "
            "--plugin FILE (in Python, import it first)"
        )
        self.kind = kind

    def of(self, plugins: Iterable[str]) -> UserError:
        """The same, for a dictionary whose config names these plugins."""
        options = " ".join(f"--plugin {shlex.quote(str(plugin))}" for plugin in plugins)
        if not options:
            return self
        return UserError(
            f"sae.parts: {shown(self.kind)} is not known; it was trained with a plugin: give {options} (that is code, which "
            "runs only where you name it; in Python, import it first)"
        )


def use(plugins: Iterable[str] | None) -> None:
    """Import plugins, each the path of a Python file or the name of a module: their parts are then known by name.

    Raises UserError for one that is not there or that fails, with the line that does.
    """
    for plugin in plugins or ():
        is_file = plugin.endswith(".py") or Path(plugin).is_file() or "/" in plugin or "\\" in plugin
        try:
            _import_file(expand_path(plugin, "plugin")) if is_file else importlib.import_module(plugin)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            if is_file or error.name not in (plugin, plugin.partition(".")[0]):
                raise _failed(plugin, error) from error
            raise UserError(
                f"plugin: {plugin} is not a module that can be imported; give the path of a .py file or an installed module"
            ) from None
        except Exception as error:  # whatever the file raises
            raise _failed(plugin, error) from error


def source(cls: type) -> str | None:
    """What to give to `use` so that a class is defined again: the absolute path of its file, or its module within a package;
    None where it is in no file, as in a notebook."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    return module.__name__ if module.__package__ and module.__name__ != "__main__" else str(Path(file).resolve())


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"plugin: {path} does not exist; give the path of a .py file or an installed module")
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


def _failed(name: str, error: Exception) -> UserError:
    last_frame = traceback.extract_tb(error.__traceback__)[-1]
    line = error.lineno if isinstance(error, SyntaxError) else last_frame.lineno
    path = error.filename if isinstance(error, SyntaxError) else last_frame.filename
    message = " ".join(str(error).split())
    return UserError(f"plugin: {name} can't be imported ({type(error).__name__}: {message}; {path}, line {line})")
