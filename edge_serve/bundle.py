"""A model version on disk: manifest, variants, hashes, labels, samples.

Layout of a bundle (README, Bundles): ``BASE/NAME/<version>/`` holds ``manifest.json`` and the files that it names. Paths
stay inside the folder, a file whose hash differs is refused, unknown keys are ignored, a higher format is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_serve.errors import BundleError, Problem
from edge_serve.schema import compact, option, read
from edge_serve.spec import InputSpec, OutputSpec

FORMAT = 1
MANIFEST = "manifest.json"
# A manifest is a few kilobytes; a larger one is no manifest and shall not fill a small board's memory.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_LABELS_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as an interpreter sees it. `scale` and `zero_point` are None where it is not quantized per tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """-1 marks a dynamic dimension."""
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, slots=True)
class SignatureTensor:
    """A tensor as a caller of the signature sees it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Signature:
    """One entry point of the model: its inputs and outputs by name."""

    inputs: dict[str, SignatureTensor]
    outputs: dict[str, SignatureTensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """One file of the model: how it is quantized and what was measured of it."""

    name: str
    file: str
    sha256: str
    bytes: int = option(low=0)
    quantization: str = "none"
    io: str = "float32"
    delegates: tuple[str, ...] = ()
    operators: dict[str, int] = option(factory=dict)
    """Operator name → how many of them the file has."""
    min_runtime: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    kept_float: tuple[str, ...] = ()
    """Layers of an int8 file that were left float on purpose."""
    samples: str | None = None
    quality: dict[str, Any] = option(factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of manifest.json, format 1. It holds no time, path or latency: two equal conversions give equal bytes."""

    format: int
    name: str
    version: int = option(low=0)
    default: str = ""
    edge_serve: str = ""
    signatures: dict[str, Signature] = option(factory=dict)
    variants: tuple[Variant, ...] = ()
    input: InputSpec = InputSpec()
    output: OutputSpec = OutputSpec()
    recipe: dict[str, Any] = option(factory=dict)
    samples: str | None = None
    files: dict[str, str] = option(factory=dict)
    """Path inside the bundle → SHA-256, of every file but the manifest itself."""

    def variant(self, name: str) -> Variant:
        """Give the variant of that name; BundleError with the known names if there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"model {self.name} version {self.version} has no variant {name!r}; it has: {known}")

    def to_json(self) -> str:
        """Give the manifest as it is written: sorted nowhere, so that people find the important keys first."""
        return json.dumps(compact(self), indent=2, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


def read_labels(path: Path) -> tuple[str, ...]:
    """Read one label a line, UTF-8; the empty lines at the end do not count. BundleError if it cannot be read."""
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            raise BundleError(f"{path}: larger than {MAX_LABELS_BYTES} bytes; this is no list of labels")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: labels cannot be read ({error})") from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


@dataclass(frozen=True, slots=True)
class Bundle:
    """A version folder that was opened: its manifest is read and its paths are checked; hashes are checked on demand."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read and check the manifest of a version folder; BundleError names the file, the key and the remedy."""
        file = path / MANIFEST
        try:
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes; this is no manifest")
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(
                f"{file}: cannot be read ({error.strerror}); make the bundle with `edge-serve convert`"
            ) from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{file}: is not JSON ({error}); copy the bundle again") from error
        manifest = parse_manifest(data, str(file))
        bundle = cls(path, manifest)
        for name in {*manifest.files, *(variant.file for variant in manifest.variants)}:
            bundle.file(name)
        return bundle

    def file(self, name: str) -> Path:
        """Give the path of a file of the bundle; BundleError if it would leave the folder or is not there."""
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or not name:
            raise BundleError(
                f"{self.path / MANIFEST}: file {name!r} is outside the bundle; paths stay inside the folder"
            )
        path = self.path / inside
        try:
            leads_out = not path.resolve().is_relative_to(self.path.resolve())
            there = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # no name that a file can have, or links in a circle
            raise BundleError(f"{self.path / MANIFEST}: file {name!r} cannot be looked for: {error}") from error
        if leads_out:
            raise BundleError(f"{path}: is a link that leads out of the bundle; copy the file itself")
        if not there:
            raise BundleError(f"{path}: is named by the manifest but is not there; copy the bundle again")
        return path

    def verify(self, name: str) -> Path:
        """Give the path of a file after its SHA-256 was compared with the manifest's; BundleError if it differs."""
        path = self.file(name)
        expected = self.manifest.files.get(name)
        if expected is None:
            expected = next((variant.sha256 for variant in self.manifest.variants if variant.file == name), None)
        if expected is None:
            raise BundleError(f"{self.path / MANIFEST}: has no hash for {name!r}; make the bundle again")
        actual = sha256_of(path)
        if actual != expected:
            raise BundleError(
                f"{path}: SHA-256 is {actual[:16]}…, the manifest says {expected[:16]}…: it was changed or damaged; copy the bundle again"
            )
        return path

    def labels(self) -> tuple[str, ...] | None:
        """Give the class labels that the manifest holds or whose file it names; None if it has none."""
        output = self.manifest.output
        if output.labels is not None:
            return output.labels
        if output.labels_file is not None:
            return read_labels(self.verify(output.labels_file))
        return None


def parse_manifest(data: Any, file: str) -> Manifest:
    """Check a manifest's JSON document; BundleError lists every mistake."""
    if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
        raise BundleError(
            f"{file}: has format {data['format']}, this edge-serve reads up to {FORMAT}; update edge-serve or convert the model again"
        )
    problems: list[Problem] = []
    manifest = read(Manifest, data, "", problems, strict=False)
    if manifest is not None:
        names = [variant.name for variant in manifest.variants]
        if not names:
            problems.append(Problem("variants", "is empty"))
        elif manifest.default not in names:
            problems.append(
                Problem("default", f"names no variant: {manifest.default!r}", f"Variants: {', '.join(names)}")
            )
        if len(set(names)) != len(names):
            problems.append(Problem("variants", "two have the same name"))
    if manifest is None or problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise BundleError(f"{file}: not a valid manifest; make the bundle again with `edge-serve convert`\n{lines}")
    return manifest
