"""Small data sets in the layout of the package sae-probes."""

import csv
from pathlib import Path

import numpy as np

WORDS = ["the", "boat", "soup", "star", "rook", "loom", "shaft", "rose", "drum", "pan", "mast", "comet"]
SHORT, LONG = 6, 40  # words of a text of either class


def write_set(
    folder: Path, name: str, rows: list[tuple[str, str]], columns: tuple[str, str] = ("prompt", "target")
) -> None:
    (folder / "data" / "cleaned_data").mkdir(parents=True, exist_ok=True)
    with (folder / "data" / "cleaned_data" / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def by_length(n: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = np.random.default_rng(seed)
    return [(" ".join(draw.choice(WORDS, size=LONG if i % 2 else SHORT)), ("short", "long")[i % 2]) for i in range(n)]


def noise(n: int, seed: int = 1) -> list[tuple[str, str]]:
    draw = np.random.default_rng(seed)
    return [(" ".join(draw.choice(WORDS, size=SHORT)), str(i % 2)) for i in range(n)]
