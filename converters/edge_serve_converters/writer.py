"""The bundle as it comes to lie on disk: manifest, model files, labels, golden samples; beside first, then renamed.

Layout and fields: README, Bundles. Golden samples (samples.npz) hold, for runs of the default signature,
`input/NAME` (real values as clients send them, [runs, *shape]), `output/NAME` (what the source model gives) and
`variant/VARIANT/NAME` (what that variant gave in the device runtime, dequantized). A device's result is right if it is
within `quality.tolerance[NAME]` of the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_serve import __version__
from edge_serve.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    Manifest,
    Signature,
    SignatureTensor,
    TensorSpec,
    Variant,
    sha256_of,
)
from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec, OutputSpec
from edge_serve_converters.flatbuffer import read_contents
from edge_serve_converters.report_html import render
from edge_serve_converters.store import Arrays
from edge_serve_converters.variants import Made

DEFAULT_FILE = "model.tflite"
LABELS = "labels.txt"
SAMPLES = "samples.npz"
REPORT = "report.json"
PAGE = "report.html"
# Where TensorFlow Serving looks for requests to warm a model up with.
WARM_UP = "assets.extra/tf_serving_warmup_requests"


@dataclass(frozen=True, slots=True)
class Content:
    """What goes into a bundle."""

    name: str
    variants: Sequence[Made]
    """The first is the default."""
    input: InputSpec
    output: OutputSpec
    labels: tuple[str, ...] | None
    samples: Arrays
    warm_up: bytes | None
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]


@contextmanager
def reserved(output: Path) -> Iterator[None]:
    """Make the base folder and try to write into it before any long work; UsageError if that fails.

    If nothing was written in the end, folders that were made here go away again.
    """
    made = []
    try:
        for folder in [*reversed(output.parents), output]:
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        if not output.is_dir():
            raise UsageError(f"{output}: is a file; -o names the model's folder, which gets a folder for each version")
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"{output}: cannot be written to ({error.strerror}); choose another folder with -o") from error
    try:
        yield
    finally:
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return  # it holds something by now


def choose_version(output: Path, wanted: int | None, force: bool) -> int:
    """Settle the version number; UsageError if it is taken and may not be replaced."""
    taken = {int(entry.name) for entry in output.iterdir() if entry.name.isdecimal()}
    if wanted is None:
        return max(taken, default=0) + 1
    if wanted in taken and not force:
        raise UsageError(
            f"{output / str(wanted)}: exists; leave --version out for the next free number, or replace it with --force"
        )
    return wanted


def write(output: Path, version: int, force: bool, content: Content) -> Path:
    """Write the bundle and give its folder; at every moment the folder is there whole or not at all."""
    beside = Path(tempfile.mkdtemp(prefix=f".{version}.", dir=output))
    try:
        _fill(beside, version, content)
        Bundle.open(beside)
        beside.chmod(0o777 & ~_umask())
        final = output / str(version)
        old = None
        if force and final.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{version}.old.", dir=output))
            final.replace(old / "bundle")
        try:
            beside.rename(final)
        except OSError as error:
            if old is not None:
                (old / "bundle").replace(final)
            raise UsageError(
                f"{final}: cannot be written ({error.strerror}); another conversion may have made it meanwhile"
            ) from error
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        return final
    except OSError as error:
        raise UsageError(
            f"{output}: the bundle cannot be written ({error.strerror}); make room, or choose another folder with -o"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fill(folder: Path, version: int, content: Content) -> None:
    files = []
    variants = []
    for made in content.variants:
        file = DEFAULT_FILE if made is content.variants[0] else f"model.{made.name}.tflite"
        shutil.copyfile(made.file, folder / file)
        files.append(file)
        variants.append(_variant(made, folder / file))
        if made.compiled is not None:
            file = f"model.{made.name}-compiled.tflite"
            shutil.copyfile(made.compiled, folder / file)
            files.append(file)
            variants.append(_compiled(variants[-1], folder / file))
    output = content.output
    if content.labels is not None:
        (folder / LABELS).write_text("".join(f"{label}\n" for label in content.labels), encoding="utf-8")
        files.append(LABELS)
    arrays = dict(content.samples)
    for made in content.variants:
        arrays.update({f"variant/{made.name}/{name}": array for name, array in made.golden.items()})
    np.savez_compressed(folder / SAMPLES, **arrays)  # type: ignore[arg-type]  # keyword names are the archive's keys
    files.append(SAMPLES)
    if content.warm_up is not None:
        (folder / WARM_UP).parent.mkdir()
        (folder / WARM_UP).write_bytes(content.warm_up)
        files.append(WARM_UP)
    manifest = Manifest(
        format=FORMAT,
        name=content.name,
        version=version,
        default=content.variants[0].name,
        edge_serve=__version__,
        signatures=_signatures(content.variants[0]),
        variants=tuple(variants),
        input=content.input,
        output=output,
        recipe=dict(content.recipe),
        samples=SAMPLES,
        files={file: sha256_of(folder / file) for file in files},
    )
    (folder / REPORT).write_text(json.dumps(content.report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render(content.report), encoding="utf-8")
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _variant(made: Made, file: Path) -> Variant:
    return Variant(
        name=made.name,
        file=file.name,
        sha256=sha256_of(file),
        bytes=file.stat().st_size,
        quantization=made.quantization,
        io=made.io,
        delegates=made.delegates,
        operators=made.contents.operators,
        min_runtime=made.min_runtime,
        inputs=tuple(made.default.inputs.values()),
        outputs=tuple(made.default.outputs.values()),
        kept_float=made.kept_float,
        samples=SAMPLES,
        quality=made.quality,
    )


def _compiled(source: Variant, file: Path) -> Variant:
    """Describe what the Edge TPU's compiler made of a variant; only an Edge TPU runs it, so nothing more was measured."""
    return dataclasses.replace(
        source,
        name=f"{source.name}-compiled",
        file=file.name,
        sha256=sha256_of(file),
        bytes=file.stat().st_size,
        delegates=("edgetpu",),
        operators=read_contents(file.read_bytes()).operators,
    )


def _signatures(default: Made) -> dict[str, Signature]:
    """Give the signatures as callers see them: quantized tensors are real numbers to them."""
    return {key: Signature(_caller_view(seen.inputs), _caller_view(seen.outputs)) for key, seen in default.seen.items()}


def _caller_view(tensors: Mapping[str, TensorSpec]) -> dict[str, SignatureTensor]:
    return {
        name: SignatureTensor(spec.shape, spec.dtype if spec.scale is None else "float32")
        for name, spec in tensors.items()
    }
