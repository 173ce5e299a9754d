"""Nothing is lost: thousands of messages, faster than the service takes them, while everything that can fail does.

The property: every input that the service acknowledged has a result that upstream acknowledged. It is checked on the wire, at
every kill (there a result may also wait in the spool) and at the end, when all is drained. Copies are allowed, and carry the
same id. What a killed broker loses after its own acknowledgement is counted apart; where the brokers live, 0 are lost from end to
end. EDGE_SERVE_NO_LOSS=10000 runs the full size, with faults as long as the issue has them; the default is shorter, for CI.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Mosquitto, Raw, digit_arrays, wait_for
from tests.system.lossy_link import ADDRESS, FAR, NEAR, LossyLink, NoNamespaceError
from tests.system.no_loss import END_S, QUEUES, Trial, persistent

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]

MESSAGES = int(os.environ.get("EDGE_SERVE_NO_LOSS", "2000"))
FULL = MESSAGES >= 10_000
CUT_S = 10.0
# Longer than upstream may be silent (5 s), and than mosquitto takes to miss a client whose keep-alive is 5 s: it looks every 6 s
# who has said nothing for 7.5 s.
STOPPED_S = {"service": 20.0 if FULL else 14.5, "result broker": 20.0 if FULL else 8.0}
DAY_S = 24 * 3600
# Frames that a camera sends before the first of them is answered.
AHEAD = 8

Brokers = Callable[..., Mosquitto]


@pytest.fixture
def two_brokers(make_broker: Brokers) -> tuple[Mosquitto, Mosquitto]:
    """A broker for inputs, and one for results; neither drops anything."""
    return make_broker(*QUEUES).start(), make_broker(*QUEUES).start()


def test_a_service_that_is_killed_five_times(tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]) -> None:
    with Trial(tmp_path, *two_brokers, case="service killed", seed=101) as trial:
        trial.publish(MESSAGES)
        for number in range(1, 6):
            trial.settled(trial.jitter(MESSAGES * number // 7))
            trial.kill()
        trial.finish()


def test_a_service_that_is_killed_while_results_wait_in_its_spool(
    tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto]
) -> None:
    with Trial(tmp_path, *two_brokers, case="service killed, upstream away", seed=102) as trial:
        trial.publish(MESSAGES)
        trial.settled(MESSAGES // 10)
        trial.results.cut()
        for number in (1, 2):
            trial.settled(trial.jitter(MESSAGES * number // 4))
            trial.kill()
        trial.results.restore()
        trial.settled(MESSAGES * 7 // 10)
        trial.kill()
        account = trial.finish()
        assert account.most_in_spool > MESSAGES // 10


@pytest.mark.parametrize("saves", [True, False], ids=["with persistence", "without persistence"])
def test_a_result_broker_that_is_killed_twice(tmp_path: Path, make_broker: Brokers, saves: bool) -> None:
    near = make_broker(*QUEUES).start()
    far = make_broker(*(persistent(tmp_path / "far") if saves else QUEUES)).start()
    with Trial(tmp_path, near, far, case=f"result broker killed, persistence {saves}", seed=103) as trial:
        trial.publish(MESSAGES)
        for number in (1, 2):
            trial.settled(trial.jitter(MESSAGES * number // 4))
            far.kill()
            trial.settled(trial.jitter(MESSAGES * number // 4) + MESSAGES // 8)
            far.start()
        trial.finish(brokers_live=False)
        assert set(trial.inputs.acknowledged) == {f"f{number}" for number in range(MESSAGES)}, (
            "its inputs' broker lives"
        )


@pytest.mark.parametrize("saves", [True, False], ids=["with persistence", "without persistence"])
def test_an_input_broker_that_is_killed_twice(tmp_path: Path, make_broker: Brokers, saves: bool) -> None:
    near = make_broker(*(persistent(tmp_path / "near") if saves else QUEUES)).start()
    far = make_broker(*QUEUES).start()
    part = MESSAGES // 3
    with Trial(tmp_path, near, far, case=f"input broker killed, persistence {saves}", seed=104) as trial:
        for _ in range(2):
            before = len(trial.inputs.acknowledged)
            trial.publish(part)
            trial.settled(before + trial.jitter(part // 3))
            near.kill()
            # Without its persistence a broker throws away what comes before somebody subscribes.
            back = "CONNACK to dev.digits.in" if saves else "SUBACK to dev.digits.in"
            times = near.log_text().count(back) + 1
            time.sleep(0.5)
            near.start()
            comes_back(near, back, times)
            wait_for(trial.publisher.look, "the broker has taken what it had not", END_S)
        trial.publish(part)
        account = trial.finish(brokers_live=False)
        assert set(trial.promised) <= set(trial.collector.results)
        assert account.acknowledged >= part, "what came after the last kill, at least"
        assert account.lost_by_result_broker == 0, "it lives"


def comes_back(broker: Mosquitto, line: str, times: int) -> None:
    """Wait until a broker has logged something for so many times."""
    wait_for(lambda: broker.log_text().count(line) >= times, f"{line!r} in the broker's log", END_S)


@pytest.mark.parametrize("swallowed", [False, True], ids=["refused", "swallowed"])
def test_a_link_that_is_cut_for_ten_seconds(
    tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto], swallowed: bool
) -> None:
    case = "both links swallow for 10 s" if swallowed else "upstream link refuses for 10 s"
    with Trial(tmp_path, *two_brokers, case=case, seed=105) as trial:
        trial.publish(MESSAGES)
        trial.settled(MESSAGES // 4)
        if swallowed:
            for tap in (trial.inputs, trial.results):
                tap.swallow()
        else:
            trial.results.cut()
        time.sleep(CUT_S)
        for tap in (trial.inputs, trial.results):
            tap.restore()
        trial.finish()


def test_a_long_and_bad_line_between_two_network_namespaces(tmp_path: Path, make_broker: Brokers) -> None:
    with contextlib.ExitStack() as stack:
        try:
            link = stack.enter_context(LossyLink(delay_s=0.04, jitter_s=0.01, loss=0.03, seed=106))
        except NoNamespaceError as error:
            pytest.skip(f"this machine makes no network namespaces joined by tun devices: {error}")
        near = make_broker(*QUEUES)
        far = make_broker(*QUEUES)
        far.listener = f"listener {far.port}"
        with link.side(NEAR):
            near.start()
        with link.side(FAR):
            far.start()
        number = MESSAGES // 2
        with Trial(
            tmp_path,
            near,
            far,
            case="80 ms and 3 % loss",
            seed=106,
            near_side=functools.partial(link.side, NEAR),
            far_side=functools.partial(link.side, FAR),
            far_host=ADDRESS[FAR],
        ) as trial:
            trial.publish(number)
            trial.settled(number // 3)
            trial.kill()
            trial.finish()
        assert link.dropped > 10, "it was a bad line"


@pytest.mark.parametrize("who", ["service", "result broker"])
def test_a_process_that_is_stopped_and_goes_on(
    tmp_path: Path, two_brokers: tuple[Mosquitto, Mosquitto], who: str
) -> None:
    near, far = two_brokers
    with Trial(tmp_path, near, far, case=f"{who} stopped for {STOPPED_S[who]:g} s", seed=107) as trial:
        trial.publish(MESSAGES)
        trial.settled(MESSAGES // 4)
        assert far.process is not None
        trial.freeze(trial.service.pid if who == "service" else far.process.pid, STOPPED_S[who])
        if who == "service":
            assert "dev.digits.in has exceeded timeout" in near.log_text(), "it was away for longer than its keep-alive"
        trial.finish()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full(tmp_path: Path, small_disk: Path, two_brokers: tuple[Mosquitto, Mosquitto]) -> None:
    with Trial(tmp_path, *two_brokers, case="disk full, upstream away", seed=108, state=small_disk) as trial:
        trial.publish(MESSAGES)
        trial.settled(MESSAGES // 20)
        trial.results.cut()
        trial.service.said("disk is full|No space left", END_S)
        trial.quiet()
        held = len(set(trial.inputs.acknowledged))
        assert held < MESSAGES, "what finds no room is not acknowledged"
        trial.kill()  # and it starts on a full disk
        trial.quiet()
        trial.results.restore()
        trial.finish()


@pytest.fixture(scope="module")
def stepped_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that moves a process's wall clock."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("moving a process's clock takes a C compiler, and there is none")
    library = tmp_path_factory.mktemp("clock") / "stepped_clock.so"
    source = Path(__file__).with_name("stepped_clock.c")
    made = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", library, source, "-ldl"], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"the library that moves a clock cannot be made here: {made.stderr.decode(errors='replace')}")
    return library


def test_a_clock_that_is_stepped_back_a_day(
    tmp_path: Path, stepped_clock: Path, two_brokers: tuple[Mosquitto, Mosquitto]
) -> None:
    step = tmp_path / "step"
    step.write_text("0")
    env = {"LD_PRELOAD": str(stepped_clock), "STEPPED_CLOCK": str(step)}
    with Trial(tmp_path, *two_brokers, case="clock stepped back a day", seed=109, env=env) as trial:
        trial.publish(MESSAGES)
        trial.settled(MESSAGES // 8)
        trial.results.cut()
        trial.settled(MESSAGES // 4)
        step.write_text(str(-DAY_S))
        trial.settled(MESSAGES // 2)
        trial.kill()
        trial.settled(MESSAGES * 5 // 8)
        step.write_text("0")
        trial.results.restore()
        trial.settled(MESSAGES * 3 // 4)
        step.write_text(str(-DAY_S))
        trial.finish()
        assert len(trial.collector.days) > 1, "the service has seen the step"


# Frames over the Unix socket.


@functools.cache
def camera_frame(number: int) -> bytes:
    """Give a JPEG of 320 × 240 pixels that shows a digit."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(digit_arrays()[0][number]).resize((320, 240)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


class Cameras:
    """Clients that send frames ahead and keep each until it is answered: after a break they send again what was not."""

    def __init__(self, path: Path, number: int, frames: int) -> None:
        self.sent = frames
        self.answered: list[str] = []
        self.problems: list[str] = []
        self._path = path
        self._over = False
        self._numbers = iter(range(frames))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name="test.camera", daemon=True) for _ in range(number)]
        for each in self._threads:
            each.start()

    def _run(self) -> None:
        waiting: dict[str, int] = {}
        while not self._over:
            camera = Raw.connect_when_there(self._path)
            with camera, contextlib.suppress(OSError):
                for identity, number in waiting.items():
                    camera.frame(camera_frame(number % 500), id=identity, content_type="image/jpeg")
                while self._ahead(camera, waiting):
                    try:
                        answer = camera.answer()
                    except AssertionError:  # half an answer, then the end
                        break
                    if answer is None:
                        break
                    if answer["type"] != "result" or answer["id"] not in waiting:
                        self.problems.append(str(answer))
                        return
                    del waiting[answer["id"]]
                    self.answered.append(answer["id"])
                else:
                    return

    def _ahead(self, camera: Raw, waiting: dict[str, int]) -> bool:
        while len(waiting) < AHEAD:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                break
            waiting[f"f{number}"] = number
            camera.frame(camera_frame(number % 500), id=f"f{number}", content_type="image/jpeg")
        return bool(waiting)

    def look(self) -> bool:
        """Give whether all frames are answered."""
        assert self.problems == []
        return len(self.answered) == self.sent

    def close(self) -> None:
        """End the clients."""
        self._over = True
        for each in self._threads:
            each.join(1)


@pytest.mark.parametrize("away", [False, True], ids=["upstream there", "upstream away in between"])
def test_camera_frames_that_are_written_through(
    tmp_path: Path, short_path: Path, make_broker: Brokers, away: bool
) -> None:
    far = make_broker(*QUEUES).start()
    source = f'type = "socket"\n    listen = "unix://{short_path}/in.sock"\n    answer = "when_safe"'
    words = {"source": source, "pipeline": "write_through = true"}
    frames = MESSAGES // 2
    case = f"camera frames, service killed{', upstream away' if away else ''}"
    with Trial(tmp_path, far, far, case=case, seed=110, words=words) as trial:
        cameras = Cameras(short_path / "in.sock", 2, frames)
        trial.feed, trial.promised = cameras, cameras.answered
        for number in range(1, 6):
            trial.settled(trial.jitter(frames * number // 7))
            if away and number in (2, 4):
                trial.results.cut() if number == 2 else trial.results.restore()
            trial.kill()
        account = trial.finish()
        assert account.most_in_spool > 0 or not away
