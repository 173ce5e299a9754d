"""The tree of errors: what went wrong, who has to act, and which exit code or result code says so.

    EdgeServeError                     anything that edge-serve raises on purpose
    ├── UsageError                     exit 2: wrong use, configuration or files; a restart will not help
    │   ├── ConfigError                the configuration, with every problem found in it
    │   ├── BundleError                a model version on disk is damaged, incomplete or not one
    │   ├── ModelError                 a model that cannot be used as it was asked for (signature, tensors, labels)
    │   │   └── DelegateError          a delegate that refuses this model, its options, or is none
    │   └── RuntimeMissingError        no TFLite runtime that works here
    ├── GateError                      exit 1: a check, gate or comparison said no
    ├── UnavailableError               exit 3: not now; retrying may help (broker, socket, device, disk)
    │   ├── SendError                  a sink could not deliver this result now
    │   └── DelegateAwayError          a delegate whose hardware is not there now, or is taken by another process
    ├── GoneError                      exit 3: an end of the pipeline is closed for good (standard output); the run ends
    ├── InputError                     one input is bad; it gets an error result and is settled ("bad_input")
    │   ├── TooLargeError              one input is over its limit ("too_large")
    │   └── QuarantinedError           one input has killed the process before and is not run again ("quarantined")
    ├── InferenceError                 the interpreter failed on one input ("inference_failed")
    │   └── DelegateFailedError        a delegate hung, died, or gave what is no result: it is of no use until it is opened again
    ├── ProtocolError                  the other end of a connection broke the protocol; that connection is closed
    ├── DroppedError                   a frame that a `latest` mailbox replaced by a newer one
    ├── StoppedError                   the loop stopped before this frame was done
    └── SourceExhausted                a finite source has no more frames (no failure)

Every message says what is wrong, where, and what to do. Causes are kept with ``raise … from``.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_GATE = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130


class EdgeServeError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line answers with."""

    exit_code = EXIT_GATE
    code = "internal"


class UsageError(EdgeServeError):
    """Wrong use, configuration or files: nothing changes until a person changes it."""

    exit_code = EXIT_USAGE


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration: where it stands, what is wrong and how to put it right."""

    key: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.key}: {self.what}" if self.key else self.what
        return f"{text}. {self.remedy}" if self.remedy else text


class ConfigError(UsageError):
    """A configuration that cannot be used; carries every problem that was found."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self.file = file
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count}\n{lines}")


class BundleError(UsageError):
    """A model version on disk is damaged, incomplete or not a bundle."""


class ModelError(UsageError):
    """A model cannot be used as it was asked for."""


class DelegateError(ModelError):
    """A delegate cannot be used as it was asked for: its library, its options, or this model."""


class RuntimeMissingError(UsageError):
    """No TFLite runtime can be loaded on this machine."""


class GateError(EdgeServeError):
    """A check, gate or comparison said no."""


class UnavailableError(EdgeServeError):
    """Something outside is not there now; retrying may help."""

    exit_code = EXIT_UNAVAILABLE


class SendError(UnavailableError):
    """A sink could not deliver a result now; the runner keeps it and tries again."""


class DelegateAwayError(UnavailableError):
    """The hardware of a delegate is not there now, or another process has it."""


class GoneError(EdgeServeError):
    """Whoever took the results is gone and will not come back; there is nothing left to run for."""

    exit_code = EXIT_UNAVAILABLE


class InputError(EdgeServeError):
    """One input cannot be used; it yields an error result and does not disturb any other."""

    exit_code = EXIT_USAGE
    code = "bad_input"


class TooLargeError(InputError):
    """One input is over a limit."""

    code = "too_large"


class QuarantinedError(InputError):
    """One input has killed the process each time that it was run; it is not run again."""

    code = "quarantined"


class InferenceError(EdgeServeError):
    """The interpreter failed on one input."""

    code = "inference_failed"


class DelegateFailedError(InferenceError):
    """A delegate hung, died or gave what is no result; it has to be opened anew before it runs again."""


class ProtocolError(EdgeServeError):
    """The peer of a connection broke the protocol; only that connection is closed."""

    code = "protocol"


class DroppedError(EdgeServeError):
    """A newer frame replaced this one in a `latest` mailbox."""

    code = "dropped"


class StoppedError(EdgeServeError):
    """The loop stopped before this frame was done; a source that can will deliver it again."""

    code = "stopped"


class SourceExhausted(EdgeServeError):
    """A finite source (a folder, standard input) has no more frames."""
