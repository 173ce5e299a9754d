"""What a model shall run on, as it is asked for, and as it is answered."""

from __future__ import annotations

from dataclasses import dataclass

from edge_serve.bundle import Variant
from edge_serve.model.delegate import CPU, Candidate, DelegateSpec
from edge_serve.model.repository import ModelVersion

MOST_THREADS = 8
# A compiled model holds this operator, and runs on nothing else.
EDGE_TPU_OPERATOR = "edgetpu-custom-op"
DEFAULT_SIGNATURE = "serving_default"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model runs on, and why."""

    line: tuple[Candidate, ...]
    """The winner, and who goes on when it fails."""
    reasons: tuple[str, ...]
    """What was tried and what came of it, for people."""
    cached: bool = False
    strict: bool = False
    """Whether nothing else may run in place of the winner at the start."""
    away: bool = False
    """Whether hardware that is there was not free to be measured: such a choice is good for now, and is not kept."""

    @property
    def winner(self) -> Candidate:
        """Give what runs."""
        return self.line[0]


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for, and the files that may serve it."""

    version: ModelVersion
    delegate: DelegateSpec | None
    fallback: tuple[DelegateSpec, ...]
    variant: str | None
    threads: int
    signature: str | None

    def variants(self) -> list[Variant | None]:
        """Give the variants that may run, the one asked for first; None stands for a file without a manifest."""
        bundle = self.version.bundle
        if bundle is None:
            return [None]
        first = bundle.manifest.variant(self.version.variant)
        others = []
        if self.variant is None and self.signature in (None, DEFAULT_SIGNATURE):
            others = [each for each in bundle.manifest.variants if each is not first and _alike(first, each)]
        return [first, *others]

    def candidate(self, spec: DelegateSpec, variant: Variant | None = None, threads: int | None = None) -> Candidate:
        """Make a candidate; the variant asked for if none is said."""
        number = threads or self.threads or 1
        bundle = self.version.bundle
        if bundle is None:
            return Candidate(self.version.variant, self.version.file, "", spec, number)
        variant = variant or bundle.manifest.variant(self.version.variant)
        return Candidate(variant.name, bundle.path / variant.file, variant.sha256, spec, number)


def _alike(first: Variant, other: Variant) -> bool:
    """Say whether a variant's tensors have the names and shapes of another one's; types are converted (adapted.py).

    Variants whose tensors the manifest does not tell stand in for nobody.
    """
    return all(
        want and {(tensor.name, tensor.shape) for tensor in have} == {(tensor.name, tensor.shape) for tensor in want}
        for have, want in ((other.inputs, first.inputs), (other.outputs, first.outputs))
    )


def stand_ins(wish: Wish, delegate: DelegateSpec) -> list[Candidate]:
    """Give what goes on when an explicit delegate fails in service: the CPU, on the first variant that it can run."""
    for variant in wish.variants():
        if variant is None or EDGE_TPU_OPERATOR not in variant.operators:
            names = CPU[CPU.index(delegate.name) + 1 :] if delegate.name in CPU else CPU
            return [wish.candidate(DelegateSpec(name), variant) for name in names]
    return []
