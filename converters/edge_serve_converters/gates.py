"""The gates that a variant must pass before it is written: how much it may lose against the float model.

Limits that a person gives are taken as they are. The defaults differ by mode, and are set so that a file that works is never
refused and one that does not always is: they know how fine the samples can measure and what random inputs can show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Errors by rounding to six digits are no reason to refuse.
_SLACK = 1e-6
# The direction of a few numbers is little more than their sign: cosine gates begin at this many values a run.
MIN_COSINE_VALUES = 8
# Scores of classes whose noise is ten times (in power) what varies in them.
MIN_SCORES_DB = -10.0


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits; None stands for the default of the mode.

    A person's limit for one kind of figure also replaces the defaults that ask the same: `max_drop` and `min_agreement`
    each stand for the classes, `min_sqnr_db` for SQNR and variation. `min_cosine` replaces the default cosine; one below it
    says that a distant variant is accepted, and stands for SQNR and variation, too.
    """

    max_drop: float | None = None
    """Most that accuracy, AUC or mean IoU may fall, as a fraction: 0.01 is one point."""
    min_agreement: float | None = None
    """Smallest part of the samples for which the variant chooses the class that the float model chooses."""
    min_cosine: float | None = None
    """Smallest cosine between an output of the variant and the float model's, over the runs."""
    min_sqnr_db: float | None = None
    """Smallest signal to quantization noise ratio of an output, in decibels."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """The limits of a mode where nobody says otherwise."""

    max_drop: float
    min_agreement: float
    min_cosine: float
    min_sqnr_db: float
    min_variation_db: float


# One point of the task's metric is the bar for every mode; what is asked besides depends on what the arithmetic can do.
#
# none: float32 against float32; other kernels, other order of sums: 80 dB and more is usual, 40 dB is another function.
# float16: weights with 11 bits, a relative error of 2**-12: 50 to 80 dB are usual, 25 dB is the noise of 4 bits.
# dynamic, int16x8: 8-bit weights alone: 25 to 45 dB are usual. At 10 dB a tenth of the output's power is noise.
# int8: 15 to 40 dB are usual; 6 dB is noise of a quarter of the power. A cosine of 0.95 is about 10 dB in one run.
# The variation (see quality.compare) is held to less, for it is a part of the power: at 3 dB half of what the outputs tell
# about the inputs is noise, at 0 dB a constant would do as well.
_DEFAULTS = {
    "none": Defaults(0.01, 0.98, 0.999, 40.0, 20.0),
    "float16": Defaults(0.01, 0.95, 0.99, 25.0, 10.0),
    "dynamic": Defaults(0.01, 0.9, 0.97, 10.0, 3.0),
    "int16x8": Defaults(0.01, 0.9, 0.97, 10.0, 3.0),
    "int8": Defaults(0.01, 0.9, 0.95, 6.0, 3.0),
}
# Random inputs lie where no training went: classes are ties there and outputs saturate or vanish. Only a file that
# computes something else is refused: with as much noise as signal, -3 dB, in any mode; for float32, which is the same
# arithmetic everywhere, 20 dB.
_RANDOM_SQNR_DB = {"none": 20.0}
_RANDOM_OTHERS_DB = -3.0


@dataclass(frozen=True, slots=True)
class Refused:
    """A gate that said no. `text` is one sentence: what was measured, the limit, what it means and what to try."""

    gate: str
    limit: float
    value: float
    text: str

    def to_json(self) -> dict[str, Any]:
        """Give it for report.json."""
        return {"gate": self.gate, "limit": self.limit, "value": self.value, "text": self.text}


def defaults(mode: str) -> Defaults:
    """Give the default limits of a mode; a mode that is not known (selective, 4-bit) is held to those of int8."""
    return _DEFAULTS.get(mode, _DEFAULTS["int8"])


def unmeasurable(gates: Gates, quality: Mapping[str, Any]) -> str | None:
    """Say which limit that a person gave cannot be measured, and what to do; None if all can. For a UsageError."""
    outputs = quality.get("outputs", {})
    if gates.max_drop is not None and "task" not in quality:
        return (
            "--max-drop: without labels there is no accuracy, AUC or mean IoU that could drop; give labels for the "
            "calibration data (--labels-for, or folders by class), or use --min-agreement or --min-cosine"
        )
    if gates.min_agreement is not None and not _choosing(quality, asked=True):
        return (
            "--min-agreement: no output holds the scores of classes, so there is no choice to agree on; "
            "use --min-cosine, or --max-drop with labels"
        )
    if not outputs and (gates.min_cosine is not None or gates.min_sqnr_db is not None):
        return "--min-cosine: the outputs of this model cannot be compared with the source model's; leave it out"
    return None


def check(quality: Mapping[str, Any], gates: Gates, mode: str) -> list[Refused]:
    """Give the gates that a variant fails; an empty list: it may be shipped.

    `quality` is the manifest's: outputs (quality.compare), measured_on ("held-back" or "random"), and task
    (task.task_figures) where there is truth. What of `gates` cannot be measured is not checked here: see `unmeasurable`.

    Defaults: with truth, a drop of more than one point and of more than one sample refuses the variant. Without,
    classifiers must agree on 9 of 10 samples, ties of the reference and one sample forgiven; all other outputs have limits
    on cosine, SQNR and variation. Random inputs only show a file that computes something else.
    """
    random = quality.get("measured_on") == "random"
    limits = defaults(mode)
    found = list(_numbers(quality))
    found += _drop(quality, gates, limits)
    found += _agreement(quality, gates, limits, random)
    found += _closeness(quality, gates, limits, mode, random)
    return found


def _numbers(quality: Mapping[str, Any]) -> Iterator[Refused]:
    for name, figures in quality.get("outputs", {}).items():
        broken = figures.get("broken", 0)
        if broken:
            text = (
                f"output {name!r} holds {broken} values that are NaN or infinite where the source model gives numbers: "
                "this variant must not be shipped; convert to another mode"
            )
            yield Refused("numbers", 0, broken, text)


def _drop(quality: Mapping[str, Any], gates: Gates, limits: Defaults) -> Iterator[Refused]:
    task = quality.get("task")
    if task is None:
        return
    value = task["drop"]
    # Of less than 100 samples one is worth more than a point: no sample set can resolve less than one of its own.
    limit = max(limits.max_drop, task.get("resolution", 0.0)) if gates.max_drop is None else gates.max_drop
    if value > limit + _SLACK:
        name = {"accuracy": "accuracy", "auc": "AUC", "mean_iou": "mean IoU"}[task["metric"]]
        text = (
            f"{name} falls from {task['float']:.4f} to {task['variant']:.4f} on {task['samples']} held-back "
            f"{'pixels' if task['metric'] == 'mean_iou' else 'samples'}, by {100 * value:.2f} points where "
            f"{100 * limit:.2f} are allowed: it answers worse than the source model; {_advice('--max-drop')}"
        )
        yield Refused("max_drop", limit, value, text)


def _agreement(quality: Mapping[str, Any], gates: Gates, limits: Defaults, random: bool) -> Iterator[Refused]:
    asked = gates.min_agreement
    if asked is None and (random or "task" in quality or gates.max_drop is not None):
        return
    for name, figures in _choosing(quality, asked=asked is not None).items():
        limit = limits.min_agreement if asked is None else asked
        value = figures["clear_agreement"] if asked is None else figures.get("agreement", figures.get("equal"))
        # One sample of ten or fewer is already more than the default allows, and says nothing.
        lost = (1 - value) * figures["choices"]
        if value < limit - _SLACK and (asked is not None or lost > 1.5):
            ties = "" if asked is not None else ", near ties not counted"
            text = (
                f"output {name!r} chooses the source model's class for {value:.1%} of {figures['choices']} choices{ties}, "
                f"where {limit:.1%} are asked: it decides otherwise; {_advice('--min-agreement')}"
            )
            yield Refused("min_agreement", limit, value, text)


def _choosing(quality: Mapping[str, Any], *, asked: bool) -> dict[str, Mapping[str, Any]]:
    """Give the outputs that choose classes: those with scores; if a person asks and there are none, those with numbers of classes."""
    outputs: Mapping[str, Mapping[str, Any]] = quality.get("outputs", {})
    scores = {name: figures for name, figures in outputs.items() if "agreement" in figures}
    return scores or {name: figures for name, figures in outputs.items() if asked and "equal" in figures}


def _closeness(
    quality: Mapping[str, Any], gates: Gates, limits: Defaults, mode: str, random: bool
) -> Iterator[Refused]:
    lenient = gates.min_cosine is not None and gates.min_cosine < limits.min_cosine
    for name, figures in quality.get("outputs", {}).items():
        for gate, key, meaning, limit in (
            ("min_cosine", "cosine", _TURNED, gates.min_cosine),
            ("min_sqnr_db", "sqnr_db", _NOISY, gates.min_sqnr_db),
        ):
            if limit is not None and figures.get(key, limit) < limit - _SLACK:
                yield _far(gate, name, key, meaning, limit, figures[key])
        chosen = "agreement" in figures and not random
        wrong = (
            None if lenient else _scores(figures, limits, mode) if chosen else _values(figures, limits, mode, random)
        )
        if wrong is not None:
            gate, key, meaning, limit = wrong
            if (gates.min_cosine if gate == "min_cosine" else gates.min_sqnr_db) is not None:
                continue  # the person's own limit was asked above
            yield _far(gate, name, key, meaning, limit, figures[key])


Wrong = tuple[str, str, str, float]
"""Gate, figure, what that means, limit."""
_TURNED = "points another way than the source model's on some input"
_NOISY = "has too much noise in it"
_CONSTANT = "tells little more about the input than a constant would"


def _values(figures: Mapping[str, Any], limits: Defaults, mode: str, random: bool) -> Wrong | None:
    """Judge an output of which the numbers count, by the defaults."""
    if figures.get("equal", 0.0) >= limits.min_agreement:  # numbers of classes: how far apart they are says nothing
        return None
    if random:
        limit = _RANDOM_SQNR_DB.get(mode, _RANDOM_OTHERS_DB)
        meaning = "computes something else than the source model's, even on random inputs"
        return ("min_sqnr_db", "sqnr_db", meaning, limit) if figures.get("sqnr_db", limit) < limit else None
    if figures.get("values", 0) >= MIN_COSINE_VALUES and figures["cosine"] < limits.min_cosine:
        return "min_cosine", "cosine", _TURNED, limits.min_cosine
    if figures.get("sqnr_db", limits.min_sqnr_db) < limits.min_sqnr_db:
        return "min_sqnr_db", "sqnr_db", _NOISY, limits.min_sqnr_db
    if figures.get("variation_db", limits.min_variation_db) < limits.min_variation_db:
        return "min_sqnr_db", "variation_db", _CONSTANT, limits.min_variation_db
    return None


def _scores(figures: Mapping[str, Any], limits: Defaults, mode: str) -> Wrong | None:
    """Judge scores of classes beyond the choice: all samples may be of one class, and the choice then shows nothing.

    Scores that hardly vary are well within an 8-bit step; only noise beyond both says that the variant answers at random.
    Where nothing is quantized, the scores themselves must be those of the source model.
    """
    if mode == "none" and figures["sqnr_db"] < limits.min_sqnr_db:
        return "min_sqnr_db", "sqnr_db", _NOISY, limits.min_sqnr_db
    low, high = figures["range"]
    step = (1.0 if low >= 0 and high <= 1 else high - low) / 256
    if figures.get("variation_db", 0.0) < MIN_SCORES_DB and figures["mean_error"] > step:
        return "min_sqnr_db", "variation_db", _CONSTANT, MIN_SCORES_DB
    return None


_WORDS = {"cosine": "lowest cosine", "sqnr_db": "SQNR", "variation_db": "SQNR of what varies between the samples"}


def _far(gate: str, name: str, key: str, meaning: str, limit: float, value: float) -> Refused:
    shown = (f"{value:.6g}", f"{limit:.6g}") if key == "cosine" else (f"{value:.1f} dB", f"{limit:.1f} dB")
    flag = "--min-cosine" if gate == "min_cosine" else "--min-sqnr"
    text = f"output {name!r} {meaning}: its {_WORDS[key]} is {shown[0]} where {shown[1]} is asked; {_advice(flag)}"
    return Refused(gate, limit, value, text)


def _advice(flag: str) -> str:
    return (
        "try another mode, keep the layers float that it cannot do without (--auto, --keep-float), give more calibration "
        f"data or such as the device really sees, or accept it with {flag}"
    )
