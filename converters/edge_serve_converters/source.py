"""What every kind of calibration data has in common: samples by index, how they may be split, and what labels are for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan
from edge_serve_converters.store import Array, Arrays

# In the calibration data itself, labels go by one of these names (arrays, columns, features), in any case.
LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many samples there are, and which of them share data and so must not both calibrate and measure."""

    count: int
    starts: Array | None = None
    """[count] ascending: the first row of each window, where windows are neighbours in one recording. None: nothing is shared."""
    length: int = 1
    """Rows of a window."""
    files: Array | None = None
    """[count] the number of the file that a sample is cut from, where files must not be torn apart."""


@dataclass(frozen=True, slots=True)
class OwnLabels:
    """Labels that the calibration data hold themselves: one for each unit, numbers or text."""

    name: str
    values: Array


class Source(ABC):
    """Where samples come from. A unit is what has a label of its own: a sample, a row, a picture, a recording."""

    unit = "sample"
    notes: list[str]
    """What the person should know of the data; it grows while samples are read."""

    def __init__(self, path: Path, spec: InputSpec) -> None:
        self.path = path
        self.spec = spec
        self.notes = []

    @property
    def as_is(self) -> bool:
        """Say whether samples are taken as they are: then whoever made the file scaled them, rightly or wrongly."""
        return False

    @property
    def units(self) -> int | None:
        """Give the number of units, or None where only the signature tells."""
        return None

    def hint(self, signature: str, name: str) -> Shape | None:
        """Give the shape of one sample of an input, as far as the data says it before the signature is settled."""
        return None

    @abstractmethod
    def open(self, signature: SignaturePlan) -> Layout:
        """Check the data against a signature and settle what a sample is. UsageError says what does not fit."""

    @abstractmethod
    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Give samples by index, input name → [len(indices), *sample_shape] in the input's dtype; `open` came before."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Give a SHA-256 of the data that was used."""

    def own_labels(self) -> OwnLabels | None:
        """Give the labels that the data hold themselves."""
        return None

    def folders(self) -> list[str] | None:
        """Give the name of each unit's folder, "" for the data's own; None where units are no files."""
        return None

    def fold(self, values: Array) -> Array:
        """Give the label of each sample from those of the units, [units] → [samples]; `open` came before."""
        return values


def only_input(source: Path, signature: SignaturePlan) -> InputPlan:
    """Give the one input of a signature; UsageError if there are several, for data that can serve only one."""
    if len(signature.inputs) != 1:
        names = ", ".join(entry.name for entry in signature.inputs)
        raise UsageError(
            f"{source}: signature {signature.key} has several inputs ({names}); give an .npz with these names"
        )
    return signature.inputs[0]


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Give names for a message: all of a few, the first of many and how many there are."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} … ({len(names)} in all)"


def folder_names(root: Path, files: Sequence[Path]) -> list[str]:
    """Give the name of the folder that holds each file, "" where that is the root itself."""
    return [file.parent.name if file.parent != root else "" for file in files]
