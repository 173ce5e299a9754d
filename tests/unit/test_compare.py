"""edge-serve compare: models that can be computed by hand are run in the device runtime and held against each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_serve.errors import UsageError
from edge_serve_converters.compare import Comparison, compare
from edge_serve_converters.errors import ConversionError
from edge_serve_converters.gates import Gates
from tests.unit.material import BIAS, WEIGHTS, bundle, encoded, model, noise

SAMPLES = np.random.default_rng(5).uniform(-1.5, 1.5, (30, 4)).astype(np.float32)


def data(folder: Path, name: str = "data.npz", **arrays: NDArray[Any]) -> Path:
    """Write samples."""
    file = folder / name
    np.savez(file, **arrays)  # type: ignore[arg-type]  # keyword names are the archive's keys
    return file


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Samples for the linear model."""
    return data(tmp_path, x=SAMPLES)


def compared(reference: Path, other: Path, given: Path, **options: Any) -> dict[str, Any]:
    """Compare; gives the document."""
    return compare(Comparison(reference, other, given, **options), lambda *_: None)


def test_a_model_is_equal_to_itself(samples: Path) -> None:
    document = compared(model("linear"), model("linear"), samples)
    reference, other = document["variants"]
    assert (reference["name"], other["name"]) == ("A linear", "B linear")
    assert reference["quality"] == {}
    figures = other["quality"]
    assert (figures["max_error"], figures["cosine"], figures["samples"]) == (0, 1, 30)
    assert document["kind"] == "comparison"
    assert document["failed"] == document["warnings"] == []
    for entry in (reference, other):
        assert entry["bytes"] == model("linear").stat().st_size
        assert 0 < entry["latency_ms"]["min"] <= entry["latency_ms"]["p50"] <= entry["latency_ms"]["p90"]
        assert entry["latency_ms"]["runs"] >= 30


def test_an_int8_file_is_off_by_its_rounding_and_the_figures_say_how_far(samples: Path) -> None:
    figures = compared(model("linear"), model("int8"), samples)["variants"][1]["quality"]
    wanted = SAMPLES @ WEIGHTS + BIAS
    assert figures["outputs"]["scores"]["range"] == pytest.approx([wanted.min(), wanted.max()], rel=1e-4)
    assert 0 < figures["max_error"] < 0.1
    assert 25 < figures["sqnr_db"] < 60
    assert figures["sqnr_db"] == figures["outputs"]["scores"]["sqnr_db"]


def test_tensors_without_the_same_names_are_matched_by_position_and_it_says_so(samples: Path) -> None:
    document = compared(model("linear"), model("bare"), samples)
    assert document["variants"][1]["quality"]["max_error"] < 1e-6
    assert any("B bare: inputs were matched by position: 'x' with" in text for text in document["warnings"])
    assert any("B bare: outputs were matched by position: 'scores' with" in text for text in document["warnings"])


def test_variants_of_a_bundle_are_chosen_or_all_compared(tmp_path: Path, samples: Path) -> None:
    folder = bundle(tmp_path / "linear", variants={"float32": "linear", "int8": "int8"})
    named = compared(folder, folder.parent, samples, reference_variant="int8", other_variant="float32")
    assert [entry["name"] for entry in named["variants"]] == ["A int8", "B float32"]
    every = compared(folder, folder, samples, every_variant=True)
    assert [entry["name"] for entry in every["variants"]] == ["A float32", "A int8", "B float32", "B int8"]
    errors = [entry["quality"].get("max_error") for entry in every["variants"]]
    assert errors[:1] + errors[2:3] == [None, 0]
    assert errors[1] == errors[3] > 0
    assert every["default"] == "A float32"
    with pytest.raises(UsageError, match="has no variant 'other'"):
        compared(folder, folder, samples, other_variant="other")


def test_classes_in_another_order_are_matched_by_their_labels(tmp_path: Path, samples: Path) -> None:
    output = {"type": "classification"}
    one = bundle(tmp_path / "one", output={**output, "labels": ["a", "b", "c"]})
    same = bundle(tmp_path / "same", output={**output, "labels": ["a", "b", "c"]})
    turned = bundle(tmp_path / "turned", output={**output, "labels": ["c", "a", "b"]})
    assert compared(one, same, samples)["variants"][1]["quality"]["top1_agreement"] == 1
    document = compared(one, turned, samples)
    scores = SAMPLES @ WEIGHTS + BIAS
    agree = float((scores.argmax(1) == scores[:, [1, 2, 0]].argmax(1)).mean())
    assert document["variants"][1]["quality"]["top1_agreement"] == pytest.approx(agree, abs=1e-5)
    assert "another order" in document["warnings"][0]
    others = bundle(tmp_path / "others", output={**output, "labels": ["a", "b", "d"]})
    document = compared(one, others, samples)
    assert document["variants"][1]["quality"]["top1_agreement"] == 1
    assert document["warnings"] == [
        "B float32: has other labels than A (only A has 'c'; only B has 'd'); classes were matched by their index"
    ]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("linear", "two_by_two", r"inputs differ: A has 'x' \[1, 4\]; B has 'a' \[1, 2\], 'b' \[1, 3\]"),
        ("linear", "votes", r"inputs have different shapes: 'x' is \[1, 4\] in A and \[1, 3\] in B.*--input-shape"),
        ("votes", "strict", r"outputs differ|cannot be compared"),
    ],
)
def test_models_that_take_or_give_other_things_are_refused_with_names_and_shapes(
    tmp_path: Path, one: str, other: str, words: str
) -> None:
    given = data(tmp_path, x=np.ones((4, 4 if one == "linear" else 3), np.float32))
    with pytest.raises(UsageError, match=words):
        compared(model(one), model(other), given)


@pytest.mark.parametrize("width", [3, 4])
def test_models_that_differ_are_told_apart_whichever_of_them_the_data_fit(tmp_path: Path, width: int) -> None:
    given = data(tmp_path, x=np.ones((4, width), np.float32))
    with pytest.raises(UsageError, match=r"'x' is \[1, 4\] in A and \[1, 3\] in B"):
        compared(model("linear"), model("votes"), given)


@pytest.mark.parametrize(("one", "other", "none"), [("pixels", "linear", "B linear"), ("linear", "pixels", "A linear")])
def test_pictures_for_a_model_that_takes_none_name_both_shapes_and_the_way_out(
    tmp_path: Path, one: str, other: str, none: str
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(encoded(noise(20, 20, 1), "PNG"))
    with pytest.raises(UsageError) as caught:
        compared(model(one), model(other), tmp_path / "pictures")
    text = str(caught.value)
    assert f"holds pictures, and {none} takes none" in text
    assert "'image' [1, 8, 8, 3]" in text
    assert "'x' [1, 4]" in text
    assert "Compare models that both take pictures" in text
    assert "pipeline.input" not in text


def test_a_signature_that_must_be_chosen_is_asked_for_by_its_option(samples: Path) -> None:
    with pytest.raises(UsageError, match=r"has the signatures mean, total .* say which with --signature$"):
        compared(model("named"), model("named"), samples)


def test_columns_of_a_table_are_chosen(tmp_path: Path) -> None:
    table = tmp_path / "log.csv"
    lines = [",".join(f"{value:.4f}" for value in row) for row in SAMPLES]
    table.write_text("a,b,c,d,state\n" + "\n".join(f"{line},idle" for line in lines), encoding="utf-8")
    with pytest.raises(UsageError, match="--channels a,b,c,d"):
        compared(model("linear"), model("int8"), table)
    assert compared(model("linear"), model("int8"), table, channels=("a", "b", "c", "d"))["data"]["samples"] == 30


def test_gates_that_fail_are_in_the_document(samples: Path) -> None:
    document = compared(model("linear"), model("int8"), samples, gates=Gates(min_cosine=0.9999999, min_sqnr_db=5))
    (failed,) = document["failed"]
    assert failed["name"] == "B int8"
    assert [gate["gate"] for gate in failed["gates"]] == ["min_cosine"]
    assert "below --min-cosine 1" in failed["reason"]
    assert not compared(model("linear"), model("int8"), samples, gates=Gates(min_cosine=0.9))["failed"]


def test_a_gate_that_cannot_be_measured_is_wrong_use(samples: Path) -> None:
    with pytest.raises(UsageError, match="--min-agreement: no output holds the scores"):
        compared(model("linear"), model("int8"), samples, gates=Gates(min_agreement=0.9))


def test_infinity_where_the_reference_has_numbers_always_fails(tmp_path: Path) -> None:
    given = data(tmp_path, x=np.array([[1, 2, 3], [0, 2, 3]], np.float32))
    document = compared(model("votes"), model("dynamic"), given)
    assert document["failed"][0]["gates"][0]["gate"] == "numbers"
    assert "1 values that are no numbers" in document["failed"][0]["reason"]
    assert not compared(model("dynamic"), model("dynamic"), given)["failed"]  # the reference has no number there either


def test_labels_measure_both_models(tmp_path: Path) -> None:
    scores = SAMPLES @ WEIGHTS + BIAS
    truth = scores.argmax(1)
    truth[:6] = (truth[:6] + 1) % 3
    given = data(tmp_path, x=SAMPLES, label=truth)
    document = compared(model("linear"), model("int8"), given, labels_for="data", samples=30, gates=Gates(max_drop=0.2))
    task = document["variants"][1]["quality"]["task"]
    assert (task["metric"], task["samples"], task["float"]) == ("accuracy", 30, 0.8)
    assert document["failed"] == []
    own = document["variants"][0]["quality"]
    assert list(own) == ["task"]  # the reference has a figure of its own, and no errors against itself
    assert (own["task"]["variant"], own["task"]["float"]) == (0.8, 0.8)
    assert "drop" not in own["task"]


def test_samples_are_drawn_by_seed_and_no_more_than_asked(samples: Path) -> None:
    def error(seed: int) -> float:
        document = compared(model("linear"), model("int8"), samples, samples=5, seed=seed)
        assert document["data"]["samples"] == 5
        return float(document["variants"][1]["quality"]["mean_error"])

    assert error(1) == error(1)
    assert len({error(seed) for seed in range(4)}) > 1


def test_pictures_reach_each_model_in_its_own_way(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(noise(20, 20, number), "PNG"))

    def photo(name: str, file: str, **meaning: Any) -> Path:
        return bundle(tmp_path / name, variants={"only": file}, input={"kind": "image", **meaning})

    plain = photo("plain", "any_size", size=[8, 8])
    assert compared(plain, photo("same", "any_size", size=[8, 8]), folder)["variants"][1]["quality"]["max_error"] == 0
    document = compared(plain, photo("bgr", "any_size", size=[8, 8], color="bgr"), folder)
    assert document["variants"][1]["quality"]["max_error"] > 0.001
    assert document["warnings"] == ["the models process inputs differently: each gets the same samples in its own way"]
    # Another size, and 8-bit pixels: still the same pictures.
    figures = compared(photo("large", "any_size", size=[20, 20]), photo("pixels", "pixels"), folder)["variants"][1]
    assert figures["quality"]["max_error"] < 0.1
    with pytest.raises(UsageError, match="dynamic shape \\[1, \\?, \\?, 3\\]"):
        compared(photo("open", "any_size"), plain, folder)


def test_a_file_that_takes_the_runtime_down_is_named(tmp_path: Path) -> None:
    given = data(tmp_path, index=np.array([[0], [1]], np.int32))
    with pytest.raises(UsageError, match="B never in the device runtime"):
        compared(model("lookup"), model("never"), given)
    out_of_range = data(tmp_path, "far.npz", index=np.array([[0], [7]], np.int32))
    with pytest.raises(ConversionError, match="A lookup in the device runtime"):
        compared(model("lookup"), model("lookup"), out_of_range)


def test_windows_of_a_table_are_the_same_for_both_or_refused(tmp_path: Path) -> None:
    table = tmp_path / "log.csv"
    rows = np.random.default_rng(1).normal(size=(60, 3))
    table.write_text("x,y,z\n" + "\n".join(",".join(f"{v:.4f}" for v in row) for row in rows), encoding="utf-8")
    one = bundle(tmp_path / "one", variants={"float32": "window"}, input={"kind": "window", "hop": 5})
    other = bundle(tmp_path / "other", variants={"float32": "window"}, input={"kind": "window", "hop": 10})
    assert compared(one, one, table)["data"]["samples"] == 11
    with pytest.raises(UsageError, match="makes 11 samples for A float32 and 6 for B float32"):
        compared(one, other, table)
    # A bare file is fed as the bundle says.
    assert compared(one, model("window"), table)["variants"][1]["quality"]["max_error"] == 0


def test_nothing_of_it_needs_tensorflow() -> None:
    code = (
        "import sys; import edge_serve_converters.compare_cli, edge_serve_converters.compare, "
        "edge_serve_converters.compare_device, edge_serve_converters.report_html, edge_serve_converters.tensorboard; "
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_children_that_run_files_do_not_import_what_reads_them() -> None:
    code = (
        "import sys; import edge_serve_converters.compare_device, edge_serve_converters.device; "
        "sys.exit(any(f'edge_serve_converters.{name}' in sys.modules for name in ('layers', 'graph', 'quality')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
