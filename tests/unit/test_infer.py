"""edge-serve infer on data of many samples: arrays, tables, folders of pictures, and how the results are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edge_serve.commands.infer import infer
from edge_serve.errors import EXIT_OK, EXIT_USAGE
from tests.unit.material import BIAS, WEIGHTS, bundle, model, plain

SAMPLES = np.random.default_rng(3).uniform(-1, 1, (5, 4)).astype(np.float32)
SCORES = SAMPLES @ WEIGHTS + BIAS


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: Any) -> Result:
    """Call the command."""
    return CliRunner().invoke(infer, [str(argument) for argument in arguments], standalone_mode=False)


def results(*arguments: Any) -> list[dict[str, Any]]:
    """Give the documents of its results."""
    called = run(*arguments, "--json")
    assert called.return_value == EXIT_OK, called.stdout
    found: list[dict[str, Any]] = json.loads(called.stdout)["results"]
    return found


def scores(found: list[dict[str, Any]], name: str = "scores") -> Any:
    """Give the tensors of results, one below the other."""
    return np.concatenate([np.array(each["result"]["tensors"][name]["data"]) for each in found])


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4)])
def test_each_sample_of_an_array_is_run(shape: tuple[int, ...]) -> None:
    np.save("x.npy", SAMPLES.reshape(shape))
    found = results(model("linear"), "x.npy")
    np.testing.assert_allclose(scores(found), SCORES, rtol=1e-5)
    assert [each["number"] for each in found] == [1, 2, 3, 4, 5]
    assert [each["id"] for each in found] == ["x.npy", "x.npy#1", "x.npy#2", "x.npy#3", "x.npy#4"]
    assert "number" not in results(model("linear"), one())[0]


def one() -> str:
    """Write an array that is one sample."""
    np.save("one.npy", SAMPLES[:1])
    return "one.npy"


def test_the_headers_say_which_sample_a_result_is_of() -> None:
    np.save("x.npy", SAMPLES)
    lines = run(model("linear"), "x.npy", "--samples", "2").stdout.splitlines()
    assert [line.split("  (")[0] for line in lines[::2]] == ["x.npy, sample 1 of 5", "x.npy, sample 2 of 5"]
    assert run(model("linear"), one()).stdout.startswith("one.npy  (")


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": SAMPLES},
        {"serving_default/x": SAMPLES, "other/x": SAMPLES[:2, :3]},
        {"features": SAMPLES, "label": np.arange(5)},
    ],
)
def test_archives_are_read_as_convert_reads_them(arrays: dict[str, Any]) -> None:
    np.savez("x.npz", **arrays)
    np.testing.assert_allclose(scores(results(model("linear"), "x.npz")), SCORES, rtol=1e-5)


def test_samples_of_several_inputs_stay_together() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(9, dtype=np.float32).reshape(3, 3)
    np.savez("x.npz", a=a, b=b, labels=np.arange(3))
    joined = scores(results(model("two_by_two"), "x.npz"), "joined")
    np.testing.assert_array_equal(joined, np.concatenate([a, b], axis=1))
    np.savez("x.npz", a=a, b=b[:2])
    assert "different numbers of samples (a: 3, b: 2)" in run(model("two_by_two"), "x.npz").stderr
    np.savez("x.npz", a=a, c=b)
    assert "lacks the input 'b'; it has the arrays a, c" in run(model("two_by_two"), "x.npz").stderr


def test_scalars_are_samples_too() -> None:
    np.save("x.npy", np.array([1, 0, 1], np.int32))
    assert len(results(model("lookup"), "x.npy", "--delegate", "none")) == 3


def test_a_failure_names_the_sample_and_leaves_those_before_it() -> None:
    np.save("x.npy", np.array([1, 7], np.int32))
    called = run(model("lookup"), "x.npy", "--delegate", "none")
    assert called.return_value == EXIT_USAGE
    assert "x.npy, sample 1 of 2" in called.stdout
    assert called.stderr.startswith("x.npy, sample 2 of 2: ")


def table(header: str, *columns: Any, name: str = "x.csv", mark: str = ",") -> str:
    """Write a table."""
    rows = [mark.join(map(str, row)) for row in zip(*columns, strict=True)]
    Path(name).write_text("\n".join([*([header] if header else []), *rows]) + "\n", encoding="utf-8")
    return name


@pytest.mark.parametrize(("header", "mark"), [("a,b,c,d", ","), ("", ","), ("a;b;c;d", ";")])
def test_each_row_of_a_table_is_a_sample(header: str, mark: str) -> None:
    found = results(model("linear"), table(header, *SAMPLES.T, mark=mark))
    np.testing.assert_allclose(scores(found), SCORES, rtol=1e-4)
    assert run(model("linear"), "x.csv").stdout.startswith("x.csv, row 1 of 5  (")


def test_columns_are_chosen_and_labels_left_out() -> None:
    a, b, c, d = SAMPLES.T
    np.testing.assert_allclose(
        scores(results(model("linear"), table("a,b,label,c,d", a, b, range(5), c, d))), SCORES, rtol=1e-4
    )
    text = table("time,d,c,b,a,state", range(5), d, c, b, a, ["idle"] * 5)
    np.testing.assert_allclose(scores(results(model("linear"), text, "--channels", "a,b, c,d")), SCORES, rtol=1e-4)
    refused = run(model("linear"), text).stderr
    assert (
        "line 2, column 'state': 'idle' is text; choose the columns that are samples: --channels time,d,c,b,a"
        in refused
    )
    assert "has no column 'z'; it has: time" in run(model("linear"), text, "--channels", "z").stderr
    assert (
        "has 3 columns of numbers; input 'x' of shape [1, 4] takes 4. Choose columns"
        in run(model("linear"), text, "--channels", "a,b,c").stderr
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("a,b,c,d\n", "has a header and no rows"),
        ("1,2,3,4\n1,2,3\n", "line 2: has 3 cells"),
        ("a,b,c,d\n1,2,3,4\n1,oops,3,4\n", "line 3, column 'b': 'oops' is no finite number; leave the row out"),
        ("1,2,nan,4\n", "line 1, column '3': 'nan' is no finite number"),
        ("1,2,1e300,4\n", "'1e300' is no finite number"),
        ("label\n1\n", "has no columns beside 'label'"),
        ('a,b\n"' + "x" * 200_000 + '",2\n', "is no readable CSV"),
    ],
)
def test_tables_that_are_none_are_refused_with_line_and_column(text: str, says: str) -> None:
    Path("x.csv").write_text(text, encoding="utf-8")
    called = run(model("linear"), "x.csv")
    assert called.return_value == EXIT_USAGE
    assert called.stderr.startswith("x.csv: ")
    assert says in called.stderr


def test_windows_of_a_signal_are_told_apart_by_their_rows(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "m", variants={"float32": "window"}, input={"kind": "window", "hop": 5})
    signal = np.zeros((600, 3))
    signal[300:, 0] = 5
    text = table("ax,ay,az,state", *signal.T, ["idle"] * 600)
    assert "--channels ax,ay,az" in run(folder, text).stderr
    lines = run(folder, text, "--channels", "ax,ay,az").stdout.splitlines()[::2]
    assert len(lines) == len(set(lines)) == 119
    assert [line.split("  (")[0] for line in lines[:2]] == [
        "x.csv, window 1, rows 1 to 10",
        "x.csv, window 2, rows 6 to 15",
    ]
    found = results(folder, text, "--channels", "ax,ay,az")
    answers = scores(found)
    np.testing.assert_array_equal(answers[:59], np.full((59, 2), answers[0]))  # all of them end before row 301
    assert (answers[59] != answers[0]).any()
    assert found[-1]["id"] == "x.csv#118"  # also across the pieces that are handed on
    assert len(results(folder, text, "--channels", "ax,ay,az", "--samples", "3")) == 3


def test_whole_windows_are_taken_as_convert_takes_them_and_it_says_so(tmp_path: Path) -> None:
    meaning = {"kind": "window", "mean": [1.0], "std": [2.0]}
    folder = bundle(tmp_path / "m", variants={"float32": "window"}, input=meaning)
    windows = np.random.default_rng(1).normal(size=(3, 10, 3)).astype(np.float32)
    np.save("x.npy", windows)
    np.savez("x.npz", samples=windows)
    bare = scores(results(model("window"), "x.npy", "--kind", "tensor"))
    for name in ("x.npy", "x.npz"):
        np.testing.assert_array_equal(scores(results(folder, name)), bare)
        assert "without mean and std" in run(folder, name).stderr
    np.save("signal.npy", windows[0] * 2 + 1)  # samples of a signal are normalized, as on the device
    np.testing.assert_allclose(scores(results(folder, "signal.npy")), bare[:1], rtol=1e-5)


def test_a_folder_of_pictures_is_run_picture_by_picture(here: Path) -> None:
    (here / "photos" / "more").mkdir(parents=True)
    (here / "photos" / ".hidden").mkdir()
    for name in ("b.png", "a.png", "more/c.png", ".hidden/d.png"):
        plain(8, 8, (10, 20, 30)).save(here / "photos" / name)
    assert run(model("pixels"), "photos").stderr == ""
    for name in ("e.bmp", "more/f.BMP", "g.webp"):
        (here / "photos" / name).write_bytes(b"")
    found = results(model("pixels"), "photos")
    assert [each["input"] for each in found] == ["photos/a.png", "photos/b.png", "photos/more/c.png"]
    called = run(model("pixels"), "photos")
    assert "note: photos: other pictures were left out (2 .bmp, 1 .webp); only JPEG and PNG are read" in called.stderr
    assert "photos: holds pictures; this model takes none, but x [1, 4]" in run(model("linear"), "photos").stderr
    empty = run(model("pixels"), "photos/.hidden/..")
    assert empty.return_value == EXIT_OK
    (here / "nothing").mkdir()
    assert "nothing: is a folder without JPEG or PNG pictures" in run(model("pixels"), "nothing").stderr


def test_pictures_as_pixels_come_in_one_array_too() -> None:
    np.save("x.npy", np.stack([np.asarray(Image.new("RGB", (20, 30), (n, 20, 30))) for n in (10, 40)]))
    found = scores(
        results(model("pixels"), "x.npy", "--scale", "0.00392156862745098", "--mean", "0", "--std", "1"), "means"
    )
    np.testing.assert_allclose(found[:, 0] * 255, [10, 40], atol=1.5)


def test_what_only_the_converter_reads_says_what_to_do_instead(here: Path) -> None:
    (here / "x.wav").write_bytes(b"RIFF")
    called = run(model("window"), "x.wav")
    assert called.return_value == EXIT_USAGE
    assert ".wav files are read by convert and compare only; give the samples as .npy" in called.stderr
    assert (
        "a table does not fit a model that takes image [1, 8, 8, 3]; give pictures"
        in run(model("pixels"), table("a", range(3))).stderr
    )


def test_a_single_score_is_of_no_class_unless_labels_say_so(here: Path) -> None:
    np.save("x.npy", np.zeros((1, 25), np.float32))
    (line,) = run(model("null"), "x.npy", "--output-type", "classification").stdout.splitlines()[1:]
    assert line.split()[1:] == ["first"]  # the output's name
    (here / "labels.txt").write_text("worn\n", encoding="utf-8")
    (line,) = run(model("null"), "x.npy", "--labels", "labels.txt").stdout.splitlines()[1:]
    assert line.split()[1:] == ["worn"]
    best = run(model("linear"), one(), "--output-type", "classification", "--top-k", "1").stdout.splitlines()[1]
    assert "class" in best  # one of several


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [model("named"), "x.npy"],
            "has the signatures mean, total and none is serving_default; say which with --signature",
        ),
        ([model("linear"), "x.npy", "--kind", "image"], "say --kind tensor"),
    ],
)
def test_errors_speak_of_options_and_not_of_a_configuration(arguments: list[Any], says: str) -> None:
    np.save("x.npy", SAMPLES)
    called = run(*arguments)
    text = str(called.exception or called.stderr)
    assert says in text
    assert "[pipeline" not in text
