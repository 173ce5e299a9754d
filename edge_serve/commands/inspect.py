"""`edge-serve inspect`: a model's signatures, tensors, quantization, operators, and what the delegate claims."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from edge_serve.bundle import TensorSpec
from edge_serve.schema import compact


@click.command(
    epilog="""\b
Examples:
  edge-serve inspect models/digits
  edge-serve inspect mobilenet.tflite --json"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--version", "number", default="latest", show_default=True, help="Version of the model.")
@click.option("--variant", help="Variant of the bundle (default: the bundle's).")
@click.option(
    "--delegate",
    default="auto",
    show_default=True,
    help="Whose operators to count: auto (here: xnnpack), none, edgetpu, gpu, one of several (edgetpu:usb:0), or a library.",
)
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="A configuration whose service ran here: shows what was chosen for the model, and why.",
)
@click.option("--runtime", type=click.Choice(["auto", "litert", "tflite-runtime"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(
    model: Path, number: str, variant: str | None, delegate: str, config: Path | None, runtime: str, as_json: bool
) -> None:
    """Show what MODEL (a bundle, one version of it, or a .tflite file) is and how it would run here."""
    report = describe(model, number, variant, delegate, runtime)
    if config is not None:
        from edge_serve.app import load
        from edge_serve.model.choice import reasons

        folder = load(config).state_dir
        report["choices"] = reasons(folder, Path(report["file"]))
        report["state_dir"] = str(folder)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def describe(model: Path, number: str, variant: str | None, delegate: str, runtime_name: str) -> dict[str, Any]:
    """Give everything that is known of a model, JSON-ready."""
    from edge_serve.model import delegate as delegates
    from edge_serve.model import signatures
    from edge_serve.model.interpreter import load_runtime, reading
    from edge_serve.model.opening import load_part, open_model
    from edge_serve.model.repository import find

    version = find(model, number, variant=variant)
    runtime = load_runtime(runtime_name)
    spec = delegates.DelegateSpec.parse("xnnpack" if delegate == delegates.AUTO else delegate)
    if spec.name in delegates.CPU:
        load_part(spec)
        interpreter = runtime.open(version.file, threads=1, xnnpack=spec.name == "xnnpack")
        with reading(version.file):
            claims = delegates.claims(interpreter)
            found = {key: _bound(interpreter, key, version.file) for key in signatures.keys(interpreter)}
    else:
        engine = open_model(version.file, spec, runtime)
        claims = engine.claims
        found = {engine.signature: _tensors(engine.inputs.values(), engine.outputs.values())}
        engine.close()
    manifest = version.bundle.manifest if version.bundle is not None else None
    return {
        "v": 1,
        "name": version.name,
        "version": version.version,
        "variant": version.variant,
        "file": str(version.file),
        "bytes": version.file.stat().st_size,
        "variants": [
            {"name": v.name, "quantization": v.quantization, "io": v.io, "bytes": v.bytes, "quality": v.quality}
            for v in manifest.variants
        ]
        if manifest is not None
        else [],
        "input": compact(version.input),
        "output": {key: value for key, value in compact(version.output).items() if key != "labels"},
        "labels": len(version.labels) if version.labels is not None else None,
        "signatures": found,
        "runtime": {"name": runtime.name, "version": runtime.version},
        "delegate": {
            "name": spec.label,
            "claimed": claims.taken,
            "operators": claims.total,
            "not_claimed": {
                name: count - claims.claimed.get(name, 0)
                for name, count in claims.operators.items()
                if count > claims.claimed.get(name, 0)
            },
        },
        "operators": claims.operators,
    }


def _bound(interpreter: Any, key: str, file: Path) -> dict[str, Any]:
    from edge_serve.model import signatures

    binding = signatures.bind(interpreter, key, str(file))
    return _tensors((spec for _, spec in binding.inputs.values()), (spec for _, spec in binding.outputs.values()))


def _tensors(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> dict[str, Any]:
    return {"inputs": [compact(spec) for spec in inputs], "outputs": [compact(spec) for spec in outputs]}


def _print(report: dict[str, Any]) -> None:
    title = report["name"] + (f" version {report['version']}" if report["version"] is not None else "")
    click.echo(f"{title}, variant {report['variant']}: {report['file']} ({report['bytes']:,} bytes)")
    for variant in report["variants"]:
        click.echo(
            f"  variant {variant['name']:<10} {variant['quantization']:<10} io {variant['io']:<8} {variant['bytes']:>12,} bytes"
        )
    for key, signature in report["signatures"].items():
        click.echo(f"\nsignature {key}")
        for direction in ("inputs", "outputs"):
            for tensor in signature[direction]:
                click.echo(f"  {direction[:-1]:<7} {_tensor(tensor)}")
    for direction in ("input", "output"):
        if report[direction]:
            click.echo(f"\n{direction}: " + ", ".join(f"{key} = {value}" for key, value in report[direction].items()))
    delegate = report["delegate"]
    runtime = report["runtime"]
    click.echo(
        f"\n{runtime['name']} {runtime['version']}, {delegate['name']}: claims {delegate['claimed']} of {delegate['operators']} operators"
    )
    for name, count in report["operators"].items():
        left = delegate["not_claimed"].get(name, 0)
        click.echo(f"  {count:>4} {name}" + (f"  ({left} not claimed)" if left and delegate["name"] != "none" else ""))

    for number, reasons in enumerate(report.get("choices", ())):
        click.echo("\nchosen here:" if not number else "\nand before, or otherwise configured:")
        for reason in reasons:
            click.echo(f"  {reason}")
    if report.get("choices") == []:
        click.echo(
            f"\nnothing was chosen yet in {report['state_dir']}; `edge-serve run` does it at its first start. A service whose state "
            "folder is another: name that with STATE_DIRECTORY (an installed one has /var/lib/edge-serve)"
        )


def _tensor(tensor: dict[str, Any]) -> str:
    spec = TensorSpec(
        tensor["name"], tensor["dtype"], tuple(tensor["shape"]), tensor.get("scale"), tensor.get("zero_point")
    )
    text = f"{spec.name}: {spec.dtype} {list(spec.shape)}"
    if spec.scale is not None:
        text += f"  real = (q - {spec.zero_point}) * {spec.scale:.8g}"
    return text
