"""TFRecord files of tf.train.Example as calibration data. Only the records that are drawn are decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve.errors import EdgeServeError, UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters import example
from edge_serve_converters.plan import InputPlan, Shape, SignaturePlan, as_input
from edge_serve_converters.source import LABEL_NAMES, Layout, OwnLabels, Source, listed
from edge_serve_converters.store import Array, Arrays
from edge_serve_converters.tfrecord import RecordFile

SUFFIXES = (".tfrecord", ".tfrecords")
_PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def is_record_file(path: Path) -> bool:
    """Tell TFRecord files by their names: x.tfrecord, x.tfrecords.gz, and shards, x.tfrecord-00000-of-00008."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES) or any(f"{suffix}-" in name and "-of-" in name for suffix in SUFFIXES)


class RecordSource(Source):
    """Records, in the order of the files' paths. Features are named after the inputs (or signature/input).

    A model with one input also takes the only picture or the only list of numbers that the records hold.
    """

    unit = "record"

    def __init__(self, path: Path, files: Sequence[Path], spec: InputSpec) -> None:
        super().__init__(path, spec)
        self._files = [RecordFile(file) for file in files]
        self._first = np.cumsum([0, *(len(file) for file in self._files)])
        if not self.units:
            raise UsageError(f"{path}: holds no records; calibration needs samples, at least 20, better 100 or more")
        self._digest = hashlib.sha256()
        self._pictures = False
        _, self._sample = next(self._examples(np.array([0])))

    @property
    def as_is(self) -> bool:
        """Numbers are taken as they are; pictures are processed as on the device."""
        return not self._pictures

    @property
    def units(self) -> int:
        """Give the number of records."""
        return int(self._first[-1])

    def _examples(self, indices: Array) -> Iterator[tuple[str, dict[str, memoryview]]]:
        """Give (place for messages, features) of records, whose indices ascend."""
        for number, file in enumerate(self._files):
            inside = indices[(indices >= self._first[number]) & (indices < self._first[number + 1])]
            for record, payload in file.read((inside - self._first[number]).tolist()):
                where = f"{file.path}, record {record}"
                try:
                    yield where, example.features(payload)
                except ValueError as error:
                    raise UsageError(f"{where}: {error}") from error

    def hint(self, signature: str, name: str) -> Shape | None:
        """Give the number of values in the first record's feature; their shape only the signature knows."""
        key = next((key for key in (f"{signature}/{name}", name) if key in self._sample), None)
        try:
            values = example.decode(self._sample[key]) if key is not None else []
        except ValueError:
            return None
        return None if isinstance(values, list) else (values.shape if len(values) != 1 else ())

    def open(self, signature: SignaturePlan) -> Layout:
        """Check the first record against the inputs."""
        for entry in signature.inputs:
            self._key(signature, entry)
        return Layout(self.units)

    def _key(self, signature: SignaturePlan, entry: InputPlan) -> str:
        for key in (f"{signature.key}/{entry.name}", entry.name):
            if key in self._sample:
                return key
        kinds = {name: _kind(feature) for name, feature in self._sample.items() if name.lower() not in LABEL_NAMES}
        pictures = [name for name, have in kinds.items() if have == "picture"]
        if pictures and self.spec.kind != "image":
            raise UsageError(
                f"{self.path}: feature {pictures[0]!r} holds pictures, none is named {entry.name!r}: say --kind image, "
                "or name lists of numbers after the inputs"
            )
        wanted = ("picture", "numbers") if self.spec.kind == "image" else ("numbers", "bytes")
        if len(signature.inputs) == 1:
            for kind in wanted:
                fitting = [name for name, have in kinds.items() if have == kind]
                if len(fitting) == 1:
                    return fitting[0]
        names = ", ".join(plan.name for plan in signature.inputs)
        raise UsageError(
            f"{self.path}: its records have the features {listed(list(self._sample))}, none is named {entry.name!r}; "
            f"name them after the inputs of signature {signature.key}: {names}"
        )

    def take(self, signature: SignaturePlan, indices: Array) -> Arrays:
        """Decode records; UsageError names the file and the record that does not fit."""
        keys = {entry: self._key(signature, entry) for entry in signature.inputs}
        samples = {entry: np.empty((len(indices), *entry.sample_shape), entry.dtype) for entry in keys}
        order = np.argsort(indices, kind="stable")
        readers: dict[InputPlan, Any] = {}
        for place, (where, features) in zip(order.tolist(), self._examples(indices[order]), strict=True):
            for entry, key in keys.items():
                if key not in features:
                    raise UsageError(f"{where}: has no feature {key!r}; it has: {listed(list(features))}")
                try:
                    values = example.decode(features[key])
                    samples[entry][place] = self._value(values, entry, f"{where}, feature {key!r}", readers)
                except ValueError as error:
                    raise UsageError(f"{where}, feature {key!r}: {error}") from error
                self._digest.update(f"{key}\n".encode() + features[key])
        return {entry.name: array for entry, array in samples.items()}

    def _value(self, values: list[bytes] | Array, entry: InputPlan, where: str, readers: dict[InputPlan, Any]) -> Array:
        if isinstance(values, list):
            if len(values) != 1:
                raise UsageError(f"{where}: holds {len(values)} byte strings; a sample is one")
            if self.spec.kind == "image":
                return self._picture(values[0], entry, where, readers)
            values = _raw(values[0], entry, where)
        wanted = int(np.prod(entry.sample_shape))
        if len(values) != wanted:
            raise UsageError(
                f"{where}: holds {len(values)} numbers; input {entry.name!r} of shape {list(entry.shape)} takes {wanted}"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UsageError(f"{where}: holds NaN or infinite values; leave the record out")
        shaped: Array = as_input(values[np.newaxis], entry, where)[0]
        return shaped

    def _picture(self, payload: bytes, entry: InputPlan, where: str, readers: dict[InputPlan, Any]) -> Array:
        from edge_serve_converters.pictures import image_processor  # Pillow only where there are pictures

        self._pictures = True
        if entry not in readers:
            readers[entry] = image_processor(self.spec, entry)
        try:
            pixels: Array = readers[entry].decode(payload)[0]
        except EdgeServeError as error:
            raise UsageError(f"{where}: {error}; leave the record out") from error
        return pixels.reshape(entry.sample_shape)

    def own_labels(self) -> OwnLabels | None:
        """Give the feature `label` (or `labels`) of all records, one number or text each; this reads the files once."""
        name = next((name for name in self._sample if name.lower() in LABEL_NAMES), None)
        if name is None:
            return None
        found = [
            _label(features.get(name), f"{where}, feature {name!r}")
            for where, features in self._examples(np.arange(self.units))
        ]
        if len({type(value) for value in found}) > 1:
            raise UsageError(f"{self.path}: feature {name!r} is a number in some records and text in others")
        return OwnLabels(name, np.array(found))

    def fingerprint(self) -> str:
        """Hash the features that were drawn, in the order of the records."""
        return self._digest.hexdigest()


def _kind(feature: memoryview) -> str:
    try:
        values = example.decode(feature)
    except ValueError:
        return "damaged"
    if not isinstance(values, list):
        return "numbers"
    return "picture" if values and values[0].startswith(_PICTURE_MAGIC) else "bytes"


def _raw(payload: bytes, entry: InputPlan, where: str) -> Array:
    """Read a raw little-endian tensor of the input's dtype and size."""
    dtype = np.dtype(entry.dtype).newbyteorder("<")
    size = int(np.prod(entry.sample_shape)) * dtype.itemsize
    if len(payload) != size:
        picture = "; these are pictures: say --kind image" if payload.startswith(_PICTURE_MAGIC) else ""
        raise UsageError(
            f"{where}: holds {len(payload)} bytes; input {entry.name!r} of shape {list(entry.shape)} takes {size}, "
            f"raw little-endian {entry.dtype}{picture}"
        )
    return np.frombuffer(payload, dtype).astype(entry.dtype, copy=False)


def _label(feature: memoryview | None, where: str) -> int | str:
    try:
        values = example.decode(feature) if feature is not None else []
        if len(values) != 1:
            raise UsageError(f"{where}: holds {len(values)} values; a label is one number or one text")
        value = values[0]
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if value != int(value):
            raise UsageError(f"{where}: {value} is no class; classes are whole numbers or text")
        return int(value)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {error}") from error
