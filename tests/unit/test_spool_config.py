"""The keys of delivery: what spools by default, and which pairs of settings promise what cannot be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_serve.config import SpoolConfig
from edge_serve.spill import keys
from tests.unit.material import configured, model, problems

MQTT = '[mqtt]\nurl = "mqtt://h"\n'


def text(
    source: str = 'type = "mqtt"\ntopic = "in"', sink: str = 'type = "mqtt"', pipeline: str = "", more: str = ""
) -> str:
    """Write a configuration with an MQTT source and sink."""
    return (
        f'schema = 1\ndevice = "dev"\n{MQTT}{more}\n[[pipeline]]\nname = "one"\nmodel = "{model("linear")}"\n{pipeline}\n'
        f"[pipeline.source]\n{source}\n[[pipeline.sink]]\n{sink}\n"
    )


LATEST = 'type = "mqtt"\ntopic = "in"\nqos = 0\npolicy = "latest"'
SOCKET = 'type = "socket"\nlisten = "unix:///tmp/es.sock"'


@pytest.mark.parametrize(
    ("written", "spools"),
    [
        (text(), True),
        (text(LATEST), False),
        (text(LATEST, pipeline="spool = true"), True),
        (text(LATEST, pipeline="write_through = true"), True),
        (text(pipeline="spool = false"), False),
        (text(more="[spool]\nenabled = false"), False),
    ],
    ids=["lossless", "latest", "latest-asked", "latest-through", "not-asked", "off"],
)
def test_lossless_pipelines_spool_unless_told_otherwise(tmp_path: Path, written: str, spools: bool) -> None:
    config = configured(written, tmp_path)
    assert config.spools(config.pipelines[0]) is spools
    assert bool(keys(config)) is spools


def test_the_spools_keys_are_read(tmp_path: Path) -> None:
    spool = '[spool]\nmax_bytes = 5\nmax_items = 6\nmax_age_s = 7\npolicy = "drop_oldest"\ndurability = "power"\n'
    config = configured(text(more=spool + 'drain = "newest_first"\ndrain_rate = 8'), tmp_path)
    assert config.spool == SpoolConfig(True, 5, 6, 7.0, "drop_oldest", "power", "newest_first", 8.0)


@pytest.mark.parametrize(
    "line", ["max_bytes = -1", 'policy = "drop"', "max_age_s = -1", 'durability = "disk"', "size = 1"]
)
def test_wrong_values_are_told(tmp_path: Path, line: str) -> None:
    (problem,) = problems(text(more=f"[spool]\n{line}"), tmp_path)
    assert problem.key == f"spool.{line.split(maxsplit=1)[0]}"


@pytest.mark.parametrize(
    ("written", "key", "what"),
    [
        (text(pipeline="spool = true", more="[spool]\nenabled = false"), "pipeline.spool", "enabled = false"),
        (
            text(pipeline="write_through = true", more="[spool]\nenabled = false"),
            "pipeline.write_through",
            "needs the spool",
        ),
        (text(pipeline="write_through = true\nspool = false"), "pipeline.write_through", "spool = false"),
        (
            text(pipeline="write_through = true", more='[spool]\npolicy = "drop_newest"'),
            "pipeline.write_through",
            "would drop what it is to keep",
        ),
        (text(SOCKET, 'type = "stdout"', "write_through = true"), "pipeline.write_through", "needs a sink"),
        (text(sink='type = "stdout"', pipeline="spool = true"), "pipeline.spool", "needs a sink"),
        (
            text(SOCKET, 'type = "mqtt"\n[[pipeline.sink]]\ntype = "stdout"', "write_through = true"),
            "pipeline.sink[1]",
            "cannot be written through",
        ),
        (text(sink='type = "mqtt"\nrequired = false'), "pipeline.sink", "before anybody has"),
    ],
)
def test_pairs_that_cannot_be_kept_are_refused_with_a_remedy(tmp_path: Path, written: str, key: str, what: str) -> None:
    (problem,) = problems(written, tmp_path)
    assert problem.key == key
    assert what in problem.what
    assert problem.remedy


def test_sinks_that_nobody_waits_for_are_fine_where_somebody_else_has_the_results(tmp_path: Path) -> None:
    twice = 'type = "mqtt"\nrequired = false\n[[pipeline.sink]]\ntype = "mqtt"\ntopic = "other"'
    first, second = configured(text(sink=twice), tmp_path).pipelines[0].sinks
    assert (first.required, second.required) == (False, True)
    assert not configured(text(SOCKET, 'type = "mqtt"\nrequired = false'), tmp_path).pipelines[0].sinks[0].required


def test_a_lane_is_named_by_what_the_sink_is_not_by_its_place(tmp_path: Path) -> None:
    one = configured(text(sink='type = "mqtt"\ntopic = "a"'), tmp_path)
    two = configured(text(sink='type = "stdout"\n[[pipeline.sink]]\ntype = "mqtt"\ntopic = "a"'), tmp_path)
    assert keys(one) == keys(two) == {"one/mqtt/:a"}
    twins = configured(text(sink='type = "mqtt"\n[[pipeline.sink]]\ntype = "mqtt"'), tmp_path)
    assert keys(twins) == {"one/mqtt/:edge-serve/dev/one/result", "one/mqtt/:edge-serve/dev/one/result#1"}
