"""What a measurement found: one row per setting of a dial, one number per sample; on disk as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

RESAMPLES = 2000
DIGITS = 3  # decimals of what is stored


@dataclass(frozen=True)
class Row:
    """Outcomes of all samples at one setting.

    Args:
        sweep: the dial, or another name for a group of rows.
        value: of the dial, or what the row is called.
        outcomes: numbers by name, one per sample; shares are means of 0 and 1.
    """

    sweep: str
    value: float | str
    outcomes: Mapping[str, Sequence[float]]

    def mean(self, outcome: str) -> float:
        """Mean over the samples."""
        return float(np.mean(self.outcomes[outcome]))

    def interval(self, outcome: str) -> tuple[float, float]:
        """The middle 95 % of the means of :data:`RESAMPLES` samples drawn with replacement, the same at every call."""
        values = np.asarray(self.outcomes[outcome], dtype=float)
        picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
        return float(low), float(high)


@dataclass(frozen=True)
class Findings:
    """Rows, pictures of a few samples, and what they were made with.

    Args:
        name: of the method's module.
        rows: in the order of the tables.
        pictures: strips ``(n, 16, 16, 3)`` uint8 by name.
        facts: further numbers by name.
        made: weights and settings behind all of it.
    """

    name: str
    rows: Sequence[Row]
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    made: Mapping[str, object] = field(default_factory=dict)

    def sweep(self, name: str) -> list[Row]:
        """The rows of a sweep."""
        return [row for row in self.rows if row.sweep == name]

    def row(self, sweep: str, value: float | str) -> Row:
        """The row of a sweep at one value."""
        (found,) = (row for row in self.sweep(sweep) if row.value == value)
        return found

    def save(self, folder: Path) -> Path:
        """Write ``NAME.json``."""
        pictures = {name: [list(p.shape), base64.b64encode(p.tobytes()).decode()] for name, p in self.pictures.items()}
        stored = {
            "name": self.name, "made": self.made, "facts": self.facts, "rows": [asdict(row) for row in self.rows],
            "pictures": pictures,
        }  # fmt: skip
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(stored, separators=(",", ":")).replace('{"sweep"', '\n{"sweep"') + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Read what :meth:`save` wrote."""
        stored = json.loads(path.read_text())
        pictures = {
            name: np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)
            for name, (shape, text) in stored["pictures"].items()
        }
        return cls(stored["name"], [Row(**row) for row in stored["rows"]], pictures, stored["facts"], stored["made"])


def outcomes(**values: torch.Tensor) -> dict[str, list[float]]:
    """Tensors ``(B,)``, bool or float, as lists that are short on disk."""
    return {name: [_short(v) for v in x.tolist()] for name, x in values.items()}


def strip(pictures: torch.Tensor, count: int = 6) -> np.ndarray:
    """The first pictures of ``(B, 3, 16, 16)`` in -1..1 as they are stored."""
    return ((pictures[:count] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count``."""
    return (slice(start, start + size) for start in range(0, count, size))


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, DIGITS)
