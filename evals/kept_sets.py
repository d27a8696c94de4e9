"""Results of single data sets, kept in a run so that a long measurement continues after an interruption."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.errors import UserError
from ..engine.storage.sealed import read_json, write_json

FORMAT = "temposae-set/1"


class SetResult(NamedTuple):
    """Scores of a data set, and the resampled scores behind its intervals: k -> name -> float32 [draws]."""

    scores: dict[str, Any]
    draws: dict[str, dict[str, np.ndarray]]


class KeptSets:
    """A folder with a file per data set. A file of another `key` is not used, nor any file if `fresh`."""

    def __init__(self, folder: Path, key: dict[str, Any], *, fresh: bool = False):
        self.folder, self.key, self.fresh = folder, key, fresh

    def read(self, name: str, settings: dict[str, Any]) -> SetResult | None:
        """The kept result of a data set measured with these settings; None if there is none, or it is damaged."""
        path = self._path(name)
        if self.fresh or not path.is_file():
            return None
        try:
            kept = read_json(path, name, "", form=FORMAT)
        except UserError:
            return None
        if kept["key"] != self.key or kept["settings"] != settings:
            return None
        draws = {k: {name: _array(text) for name, text in by_name.items()} for k, by_name in kept["draws"].items()}
        return SetResult(kept["scores"], draws)

    def write(self, name: str, settings: dict[str, Any], result: SetResult) -> None:
        """Keep the result of a data set. Raises OSError."""
        draws = {k: {name: _text(array) for name, array in by_name.items()} for k, by_name in result.draws.items()}
        kept = {"format": FORMAT, "key": self.key, "settings": settings, "scores": result.scores, "draws": draws}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), kept)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def _array(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
