"""`edge-serve infer`: run a model once on photos, arrays or samples."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_serve.errors import EXIT_USAGE, EdgeServeError, InferenceError, InputError, ModelError
from edge_serve.frame import Capture, Delivery, Frame, Result
from edge_serve.spec import InputSpec, OutputSpec

if TYPE_CHECKING:
    from edge_serve.commands.infer_data import Given
    from edge_serve.processing.intake import Intake, Job

MAX_INPUT_BYTES = 256 * 1024 * 1024
# Errors speak of the configuration's keys; here these are options.
_OPTIONS = (
    ("`signature`", "--signature"),
    ('kind = "tensor" under [pipeline.input]', "--kind tensor"),
    ("channels = […] under [pipeline.input]", "--channels a,b,…"),
)


@click.command(
    epilog="""\b
Examples:
  edge-serve infer models/digits photo.png other.jpg
  edge-serve infer mobilenet.tflite cat.jpg --labels labels.txt --top-k 3
  edge-serve infer models/digits photos/ --top-k 1
  edge-serve infer models/motion log.csv --channels ax,ay,az --samples 5
  edge-serve infer models/motion windows.npz --json"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--version", "number", default="latest", show_default=True, help="Version of the model.")
@click.option("--variant", help="Variant of the bundle.")
@click.option("--signature", help="Signature of the model.")
@click.option(
    "--delegate",
    default="auto",
    show_default=True,
    help="auto (here: xnnpack), none, xnnpack, edgetpu, gpu, one of several (edgetpu:usb:0), or a delegate library's path.",
)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Threads of the interpreter.")
@click.option("--runtime", type=click.Choice(["auto", "litert", "tflite-runtime"]), default="auto", show_default=True)
@click.option(
    "--kind", type=click.Choice(["image", "window", "tensor"]), help="What the inputs are, if the model does not say."
)
@click.option("--content-type", help="Content type of the inputs (default: by their names, else their first bytes).")
@click.option("--samples", type=click.IntRange(1), help="Most samples, rows or windows of each file [default: all].")
@click.option("--channels", metavar="a,b,…", help="Columns of CSV (keys of JSON) that are the samples, in this order.")
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

    MODEL is a bundle, one version of it, or a .tflite file. An INPUT is a JPEG or PNG picture or a folder of them, a .npy
    or .npz array (of one sample or, with a leading dimension, of many), a CSV file (a sample in each row, or a signal that
    is cut into windows), a JSON file, or a raw little-endian tensor.
    """
    names = options["channels"]
    overlay_in = InputSpec(
        kind=options["kind"],
        content_type=options["content_type"],
        scale=options["scale"],
        mean=_numbers(options["mean"], "--mean"),
        std=_numbers(options["std"], "--std"),
        channels=tuple(name.strip() for name in names.split(",")) if names is not None else None,
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
    for path, answer in _answers(session, inputs):
        failed += isinstance(answer, EdgeServeError)
        if as_json:
            documents.append(_document(path, answer))
        else:
            _print(path, answer)
    for note in session.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps({"v": 1, "results": documents}))
    return EXIT_USAGE if failed else 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """A result, and which part of its file it is of."""

    result: Result
    number: int | None
    """From 1 up; None: the file is one sample."""
    part: str
    """For people: "row 3 of 9"."""
    score: str | None
    """The output that gives one score, where no label says what the score is of."""


def _answers(session: _Session, inputs: tuple[Path, ...]) -> Iterator[tuple[Path, _Answer | EdgeServeError]]:
    """Give the answers of all inputs as they come; one that cannot be used leaves the others alone."""
    for given in inputs:
        path = given
        try:
            for path in session.expand(given):
                try:
                    for answer in session.run(path):
                        yield path, answer
                except EdgeServeError as error:
                    yield path, error
        except InputError as error:
            yield given, error


def _document(path: Path, answer: _Answer | EdgeServeError) -> dict[str, Any]:
    if isinstance(answer, EdgeServeError):
        return {"input": str(path), "error": {"code": answer.code, "message": str(answer)}}
    number = {} if answer.number is None else {"number": answer.number}
    return {"input": str(path), **number, **answer.result.to_dict()}


def _spoken(error: EdgeServeError) -> str:
    """Give an error's words with this command's options for the configuration's keys."""
    text = str(error)
    for key, option in _OPTIONS:
        text = text.replace(key, option)
    return text


class _Session:
    """A model that is loaded once for all inputs."""

    def __init__(self, model: Path, overlay_in: InputSpec, overlay_out: OutputSpec, options: dict[str, Any]) -> None:
        from edge_serve.health import Counters
        from edge_serve.model.delegate import DelegateSpec
        from edge_serve.model.interpreter import load_runtime
        from edge_serve.model.opening import open_model
        from edge_serve.model.repository import find
        from edge_serve.processing.setup import model_info, settle

        version = find(model, options["number"], variant=options["variant"])
        try:
            self._engine = open_model(
                version.file,
                DelegateSpec.parse("xnnpack" if options["delegate"] == "auto" else options["delegate"]),
                load_runtime(options["runtime"]),
                threads=options["threads"],
                signature=options["signature"],
            )
            meaning = settle(version, self._engine, overlay_in, overlay_out, Path.cwd())
        except ModelError as error:
            raise ModelError(_spoken(error)) from error
        self.notes: list[str] = []
        self._meaning = meaning
        self._most: int | None = options["samples"]
        # What the bundle says of payloads without a type is about messages; a file has a name.
        self._content_type = overlay_in.content_type
        self._counters = Counters()
        self._decode = meaning.decoder(self._engine)
        self._info = model_info(version, self._engine)

    def expand(self, path: Path) -> list[Path]:
        """Give the files of an input: of a folder, its pictures."""
        from edge_serve.commands import infer_data

        files, note = infer_data.expand(path)
        self._note(note)
        if path.is_dir() and self._meaning.input.kind != "image":
            told = ", ".join(f"{name} {list(spec.shape)}" for name, spec in self._engine.inputs.items())
            raise InputError(
                f"{path}: holds pictures; this model takes none, but {told}: give .npy, .npz, .csv or .json"
            )
        return files

    def run(self, path: Path) -> Iterator[_Answer]:
        """Give the results of one file: one, or one for each sample, row or window in it."""
        from edge_serve.commands import infer_data

        try:
            if path.stat().st_size > MAX_INPUT_BYTES:
                raise InputError(f"{path}: larger than {MAX_INPUT_BYTES} bytes")
            payload = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            given = infer_data.read(
                path, payload, self._content_type, self._engine.inputs, self._meaning.input, self._engine.signature
            )
        except InputError as error:
            raise type(error)(f"{path}: {error}") from error
        intake = self._intake(given, path)
        found = 0
        for answer in islice(self._run(path, given, intake), self._most):
            found += 1
            yield answer
        if not found:
            raise InputError(f"{path}: holds too few samples for one window")

    def _note(self, text: str | None) -> None:
        if text is not None and text not in self.notes:
            self.notes.append(text)

    def _intake(self, given: Given, path: Path) -> Intake:
        """Give what takes a file's payloads. Each file stands for itself: no window reaches from one into the next."""
        meaning = self._meaning
        if given.kind == "tensor":
            if meaning.input.mean is not None or meaning.input.std is not None:
                self._note(f"{path}: whole windows are taken as they are, as convert takes them: without mean and std")
            meaning = dataclasses.replace(meaning, input=InputSpec(kind="tensor"))
        elif given.kind == "window" and meaning.input.kind != "window":
            meaning = dataclasses.replace(meaning, input=dataclasses.replace(meaning.input, kind="window"))
        try:
            return meaning.intake(self._engine, self._counters, None)
        except ModelError as error:
            raise ModelError(_spoken(error)) from error

    def _run(self, path: Path, given: Given, intake: Intake) -> Iterator[_Answer]:
        count = 0
        for nth, payload in enumerate(given.payloads):
            start = time.perf_counter()
            frame = Frame(path.name, str(path), Capture.now(), given.content_type, payload)
            part = "" if given.unit is None else f"{given.unit} {nth + 1} of {len(given.payloads)}"
            try:
                jobs = intake.feed(Delivery(frame, lambda _error: None))
                for job in jobs:
                    number = count + 1 if given.unit is not None or job.window is not None else None
                    yield self._answer(path, job, start, number, part or self._window(job, count))
                    count += 1
                    start = time.perf_counter()
            except (InputError, InferenceError) as error:
                raise type(error)(f"{path}{', ' if part else ''}{part}: {_spoken(error)}") from error

    def _window(self, job: Job, nth: int) -> str:
        if job.window is None:
            return ""
        first = nth * (self._meaning.input.hop or job.window.samples)
        return f"window {nth + 1}, rows {first + 1} to {first + job.window.samples}"

    def _answer(self, path: Path, job: Job, start: float, number: int | None, part: str) -> _Answer:
        begun = time.perf_counter()
        outputs = self._engine.run(job.inputs)
        invoked = time.perf_counter()
        decoded = self._decode(outputs, job.geometry)
        timings = {
            "process": (begun - start) * 1e3,
            "invoke": (invoked - begun) * 1e3,
            "decode": (time.perf_counter() - invoked) * 1e3,
        }
        result = Result(
            path.name if number in (None, 1) else f"{path.name}#{number - 1}",
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
        output = self._meaning.output.tensor or next(iter(outputs))
        unnamed = result.type == "classification" and self._meaning.labels is None and outputs[output].size == 1
        return _Answer(result, number, part, output if unnamed else None)


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give numbers with commas between them", param_hint=name) from None


def _print(path: Path, answer: _Answer | EdgeServeError) -> None:
    if isinstance(answer, EdgeServeError):
        text = str(answer)
        click.echo(text if text.startswith((f"{path}: ", f"{path}, ")) else f"{path}: {text}", err=True)
        return
    document = answer.result.to_dict()
    result, kind = document["result"], document["type"]
    invoke = document["timings_ms"]["invoke"]
    click.echo(f"{path}{', ' if answer.part else ''}{answer.part}  ({invoke:.2f} ms)")
    if kind == "classification":
        for each in result["classes"]:
            # A single score is of no class: "class 0" would say the opposite of what a high one mostly means.
            label = answer.score or (each["label"] if each["label"] is not None else f"class {each['index']}")
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
