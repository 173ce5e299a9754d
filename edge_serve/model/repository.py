"""Which model version a pipeline gets: finds it on disk, checks it, and says what its inputs and outputs mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_serve.bundle import MANIFEST, Bundle
from edge_serve.errors import ModelError
from edge_serve.model.interpreter import check_file
from edge_serve.spec import InputSpec, OutputSpec

log = logging.getLogger(__name__)

DEFAULT_FILE = "model.tflite"
# What the variant of a file without a manifest is called.
ONLY_VARIANT = "file"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version that was found and whose file is what its manifest says; `version` is None for a bare .tflite file."""

    name: str
    version: int | None
    variant: str
    file: Path
    bundle: Bundle | None = None
    input: InputSpec = field(default_factory=InputSpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    labels: tuple[str, ...] | None = None


def versions(base: Path) -> dict[int, Path]:
    """Give the version folders of a base folder by number, as TensorFlow Serving reads them: folders named by integers."""
    try:
        return {int(entry.name): entry for entry in base.iterdir() if entry.name.isdecimal() and entry.is_dir()}
    except OSError as error:
        raise ModelError(f"{base}: cannot be read ({error.strerror}); check the path and the permissions") from error


def find(
    path: Path,
    version: str | int = "latest",
    *,
    version_labels: Mapping[str, int] | None = None,
    variant: str | None = None,
) -> ModelVersion:
    """Find a model: a .tflite file, a version folder, or a base folder with versions.

    `version` is "latest", a number, or a label of `version_labels`. The file's hash is checked against its manifest.
    Raises ModelError or BundleError, which say what was looked for and what is there.
    """
    if path.is_file():
        return _held_against(_bare(path.stem, None, path), version, version_labels or {}, variant)
    if not path.is_dir():
        raise ModelError(f"{path}: no such model; give a .tflite file, a version folder or a folder with versions")
    if (path / MANIFEST).is_file() or (path / DEFAULT_FILE).is_file():
        opened = _open(path, int(path.name) if path.name.isdecimal() else None, variant)
        return _held_against(opened, version, version_labels or {}, variant)
    found = versions(path)
    if not found:
        raise ModelError(
            f"{path}: holds neither {MANIFEST} nor version folders (1, 2, …); make one with `edge-serve convert`"
        )
    number = _number(path, version, found, version_labels or {})
    return _held_against(_open(found[number], number, variant), "latest", {}, variant)


def _held_against(
    opened: ModelVersion, version: str | int, version_labels: Mapping[str, int], variant: str | None
) -> ModelVersion:
    """Refuse a version or variant that was asked for where there is only one, and that is another."""
    if version != "latest":
        _number(opened.file, version, {} if opened.version is None else {opened.version: opened.file}, version_labels)
    if opened.bundle is None and variant not in (None, ONLY_VARIANT):
        raise ModelError(f"{opened.file}: has no variant {variant!r}: it is a single file; leave variant out")
    return opened


def _number(base: Path, version: str | int, found: Mapping[int, Path], version_labels: Mapping[str, int]) -> int:
    known = ", ".join(str(number) for number in sorted(found)) or "none"
    if version == "latest":
        return max(found)
    if isinstance(version, str):
        if version.isdecimal():
            version = int(version)
        elif version in version_labels:
            version = version_labels[version]
        else:
            labels = ", ".join(sorted(version_labels)) or "none"
            raise ModelError(
                f"{base}: no version label {version!r}; labels: {labels}; versions: {known}; or say latest"
            )
    if version not in found:
        raise ModelError(f"{base}: has no version {version}; it has: {known}")
    return version


def _open(folder: Path, number: int | None, variant: str | None) -> ModelVersion:
    if not (folder / MANIFEST).is_file():
        # A folder as TensorFlow Serving has it, without our manifest: all that is known is what the file says.
        file = folder / DEFAULT_FILE
        if not file.is_file():
            raise ModelError(
                f"{folder}: holds neither {MANIFEST} nor {DEFAULT_FILE}; make it with `edge-serve convert`"
            )
        return _bare(folder.resolve().parent.name if number is not None else folder.resolve().name, number, file)
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    chosen = manifest.variant(variant or manifest.default)
    return ModelVersion(
        manifest.name,
        number if number is not None else manifest.version,
        chosen.name,
        bundle.verify(chosen.file),
        bundle,
        manifest.input,
        manifest.output,
        bundle.labels(),
    )


def _bare(name: str, number: int | None, file: Path) -> ModelVersion:
    """Take a file without a manifest: its own metadata, if it has any, say what its inputs and outputs mean."""
    check_file(file)
    from edge_serve.model.metadata import read_metadata  # bundles do without

    found = read_metadata(file)
    if found is None:
        return ModelVersion(name, number, ONLY_VARIANT, file)
    for note in found.notes:
        log.warning("%s: %s", file, note)
    return ModelVersion(name, number, ONLY_VARIANT, file, None, found.input, found.output, found.labels)
