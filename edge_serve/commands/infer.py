"""`edge-serve infer`: run a model once on photos, arrays or samples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from edge_serve.errors import EXIT_USAGE, EdgeServeError, InputError
from edge_serve.frame import Capture, Delivery, Frame, Result
from edge_serve.sources.file import TYPES
from edge_serve.spec import InputSpec, OutputSpec

MAX_INPUT_BYTES = 256 * 1024 * 1024


@click.command(
    epilog="""\b
Examples:
  edge-serve infer models/digits photo.png other.jpg
  edge-serve infer mobilenet.tflite cat.jpg --labels labels.txt --top-k 3
  edge-serve infer models/motion window.npy --json"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--version", "number", default="latest", show_default=True, help="Version of the model.")
@click.option("--variant", help="Variant of the bundle.")
@click.option("--signature", help="Signature of the model.")
@click.option("--delegate", default="auto", show_default=True, help="auto, none or xnnpack.")
@click.option("--threads", type=click.IntRange(0, 64), default=1, show_default=True, help="Threads; 0 measures.")
@click.option("--runtime", type=click.Choice(["auto", "litert", "tflite-runtime"]), default="auto", show_default=True)
@click.option(
    "--kind", type=click.Choice(["image", "window", "tensor"]), help="What the inputs are, if the model does not say."
)
@click.option("--content-type", help="Content type of the inputs (default: by their names, else their first bytes).")
@click.option("--scale", type=float, help="Images: pixels are multiplied by this.")
@click.option("--mean", help="Images: subtracted then; one number, or one for each channel with commas.")
@click.option("--std", help="Images: divided by then; likewise.")
@click.option("--resize", type=click.Choice(["stretch", "fit", "crop"]), help="Images: how they get the model's size.")
@click.option(
    "--output-type", type=click.Choice(["classification", "detection", "tensor"]), help="What the outputs are."
)
@click.option("--labels", type=click.Path(path_type=Path), help="File with one label a line.")
@click.option("--top-k", type=click.IntRange(1), help="Most classes to show.")
@click.option("--threshold", type=float, help="Lowest score to show.")
@click.option("--activation", type=click.Choice(["none", "softmax", "sigmoid"]), help="Applied to the scores first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def infer(model: Path, inputs: tuple[Path, ...], as_json: bool, **options: Any) -> int:
    """Run MODEL once on each INPUT and print the results.

    MODEL is a bundle, one version of it, or a .tflite file. An INPUT is a JPEG or PNG picture, a .npy or .npz array, a
    JSON or CSV file, or a raw little-endian tensor.
    """
    overlay_in = InputSpec(
        kind=options["kind"],
        content_type=options["content_type"],
        scale=options["scale"],
        mean=_numbers(options["mean"], "--mean"),
        std=_numbers(options["std"], "--std"),
        resize=options["resize"],
    )
    overlay_out = OutputSpec(
        type=options["output_type"],
        labels_file=str(options["labels"].absolute()) if options["labels"] else None,
        top_k=options["top_k"],
        threshold=options["threshold"],
        activation=options["activation"],
    )
    session = _Session(model, overlay_in, overlay_out, options)
    documents = []
    failed = 0
    for path in inputs:
        try:
            documents += [{"input": str(path), **result.to_dict()} for result in session.run(path)]
        except EdgeServeError as error:
            failed += 1
            documents.append({"input": str(path), "error": {"code": error.code, "message": str(error)}})
    if as_json:
        click.echo(json.dumps({"v": 1, "results": documents}))
    else:
        for document in documents:
            _print(document)
    return EXIT_USAGE if failed else 0


class _Session:
    """A model that is loaded once for all inputs."""

    def __init__(self, model: Path, overlay_in: InputSpec, overlay_out: OutputSpec, options: dict[str, Any]) -> None:
        from edge_serve.health import Counters
        from edge_serve.model.engine import Engine
        from edge_serve.model.interpreter import load_runtime
        from edge_serve.model.repository import find
        from edge_serve.processing.setup import model_info, settle

        version = find(model, options["number"], variant=options["variant"])
        self._engine = Engine.open(
            version.file,
            runtime=load_runtime(options["runtime"]),
            delegate=options["delegate"],
            threads=options["threads"],
            signature=options["signature"],
        )
        meaning = settle(version, self._engine, overlay_in, overlay_out, Path.cwd())
        self._meaning = meaning
        # What the bundle says of payloads without a type is about messages; a file has a name.
        self._content_type = overlay_in.content_type
        self._counters = Counters()
        self._decode = meaning.decoder(self._engine)
        self._info = model_info(version, self._engine)

    def run(self, path: Path) -> list[Result]:
        """Give the results of one file: one, or one for each window in it."""
        try:
            if path.stat().st_size > MAX_INPUT_BYTES:
                raise InputError(f"{path}: larger than {MAX_INPUT_BYTES} bytes")
            payload = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        # Each file stands for itself: no window reaches from one into the next.
        intake = self._meaning.intake(self._engine, self._counters, None)
        kind = self._content_type or TYPES.get(path.suffix.lower())
        start = time.perf_counter()
        frame = Frame(path.name, str(path), Capture.now(), kind, payload)
        try:
            jobs = intake.feed(Delivery(frame, lambda _error: None))
        except InputError as error:
            raise type(error)(f"{path}: {error}") from error
        processed = time.perf_counter()
        results = []
        for job in jobs:
            begun = time.perf_counter()
            outputs = self._engine.run(job.inputs)
            invoked = time.perf_counter()
            decoded = self._decode(outputs, job.geometry)
            timings = {
                "process": (processed - start) * 1e3,
                "invoke": (invoked - begun) * 1e3,
                "decode": (time.perf_counter() - invoked) * 1e3,
            }
            results.append(
                Result(
                    job.frame.id,
                    "local",
                    "infer",
                    str(path),
                    job.frame.captured,
                    self._info,
                    self._meaning.output.type or "tensor",
                    decoded,
                    outputs,
                    timings,
                    job.key,
                    job.window,
                )
            )
        if not results:
            raise InputError(f"{path}: holds too few samples for one window")
        return results


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give numbers with commas between them", param_hint=name) from None


def _print(document: dict[str, Any]) -> None:
    name = document["input"]
    if "error" in document:
        click.echo(f"{name}: {document['error']['message'].removeprefix(name + ': ')}", err=True)
        return
    result, kind = document["result"], document["type"]
    invoke = document["timings_ms"]["invoke"]
    click.echo(f"{name}  ({invoke:.2f} ms)")
    if kind == "classification":
        for each in result["classes"]:
            label = each["label"] if each["label"] is not None else f"class {each['index']}"
            score = float("nan") if each["score"] is None else each["score"]
            click.echo(f"  {score:8.4f}  {label}")
    elif kind == "detection":
        for each in result["objects"]:
            label = each["label"] if each["label"] is not None else f"class {each['index']}"
            click.echo(f"  {each['score']:8.4f}  {label}  {each['box']}")
        if not result["objects"]:
            click.echo("  nothing found")
    else:
        for tensor, value in result["tensors"].items():
            text = json.dumps(value["data"])
            click.echo(
                f"  {tensor}: {value['dtype']} {value['shape']}  {text if len(text) <= 200 else text[:197] + '...'}"
            )
