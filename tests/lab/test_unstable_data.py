"""The home dies while nodes have written and nobody has called fsync: what was acknowledged is there all the same.

`mxfs lab kill` shuts the home's XFS down without a log flush, so whatever only its page cache had is lost with it.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from labkit import Lab, missing_capability, must, running_lab

from mxfsd import procs

pytestmark = pytest.mark.needs_lab
Work = dict[str, Path]
NEWER_NS = 1_500_000_000_123_456_789


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A cluster for each test: each kills a node of it. `lab down` checks the volume."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    with running_lab(count=3) as cluster:
        yield cluster


def kill_home(lab: Lab) -> str:
    """Kill the home; return when another node is it, and its name."""
    before = lab.home()
    lab._mxfs(["lab", "kill", str(lab.folder), before])
    found = [""]

    def moved() -> bool:
        found[0] = str(lab.status()["home"] or "")
        return found[0] not in ("", before, "None")

    assert procs.wait_until(moved, 60), "nobody took over"
    return found[0]


def bystanders(lab: Lab) -> tuple[str, str]:
    """Two nodes that are not the home."""
    first, second = lab.others()[:2]
    return first, second


def within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Run *work*, which may hang, in a thread."""
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"not within {seconds} s"
    return result[0]


def test_what_was_written_and_not_synced(lab: Lab, work: Work) -> None:
    one, two = bystanders(lab)
    big = os.urandom(3 << 20)
    (work[one] / "big").write_bytes(big)
    for number in range(40):
        (work[one] / f"small{number}").write_bytes(b"%d" % number * 100)
    with open(work[two] / "log", "ab", buffering=0) as log:
        for number in range(100):
            log.write(b"line %d\n" % number)
        kill_home(lab)
        for number in range(100, 120):
            log.write(b"line %d\n" % number)
    for name in (one, two):
        assert within(60, (work[name] / "big").read_bytes) == big
        assert (work[name] / "log").read_bytes() == b"".join(b"line %d\n" % number for number in range(120))
        for number in range(40):
            assert (work[name] / f"small{number}").read_bytes() == b"%d" % number * 100


def test_written_over_while_the_home_dies(lab: Lab, work: Work) -> None:
    """Writes go on during the takeover, over the same place: the last one stands."""
    one, two = bystanders(lab)
    fd = os.open(work[one] / "file", os.O_RDWR | os.O_CREAT)
    stop = threading.Event()
    written = [0]

    def write() -> None:
        while not stop.is_set():
            number = written[0] + 1
            os.pwrite(fd, number.to_bytes(8, "big") * 1024, number % 3 * 4096)
            written[0] = number

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        assert procs.wait_until(lambda: written[0] > 200, 20)
        kill_home(lab)
        reached = written[0]
        assert procs.wait_until(lambda: written[0] > reached + 200, 30)
    finally:
        stop.set()
        writer.join(30)
        os.close(fd)
    expected = bytearray(4 * 4096)
    for number in range(1, written[0] + 1):
        expected[number % 3 * 4096 : number % 3 * 4096 + 8192] = number.to_bytes(8, "big") * 1024
    for name in (one, two):
        assert (work[name] / "file").read_bytes() == bytes(expected)


def test_truncated_after_it_was_written(lab: Lab, work: Work) -> None:
    one, two = bystanders(lab)
    path = work[one] / "file"
    path.write_bytes(b"x" * 100_000)
    os.truncate(path, 1000)
    with open(path, "r+b", buffering=0) as file:
        file.seek(500)
        file.write(b"after")
    kill_home(lab)
    expected = b"x" * 500 + b"after" + b"x" * 495
    assert within(60, path.read_bytes) == expected
    assert (work[two] / "file").read_bytes() == expected


def test_times_and_mode_set_after_it_was_written(lab: Lab, work: Work) -> None:
    one, two = bystanders(lab)
    path = work[one] / "file"
    path.write_bytes(b"x" * 100_000)
    os.utime(path, ns=(NEWER_NS, NEWER_NS))
    path.chmod(0o4755)
    kill_home(lab)
    assert within(60, path.read_bytes) == b"x" * 100_000
    for name in (one, two):
        status = os.stat(work[name] / "file")
        assert status.st_mtime_ns == NEWER_NS
        assert status.st_mode & 0o7777 == 0o4755


def test_two_writers(lab: Lab, work: Work) -> None:
    """Open for writing on two nodes: whatever was answered is durable, and nobody's older data comes back."""
    one, two = bystanders(lab)
    first = os.open(work[one] / "file", os.O_RDWR | os.O_CREAT)
    second = os.open(work[two] / "file", os.O_RDWR)
    try:
        for turn in range(20):
            os.pwrite(first, b"A%03d" % turn, 0)
            os.pwrite(second, b"B%03d" % turn, 2)
        os.pwrite(first, b"one", 100)
        os.pwrite(second, b"two", 200)
        kill_home(lab)
        for name in (one, two):
            (work[name] / f"{name}-goes-on").touch()
        for fd in (first, second):
            assert within(60, lambda fd=fd: os.pread(fd, 300, 0)) == (  # type: ignore[misc]
                b"A0B019" + bytes(94) + b"one" + bytes(97) + b"two"
            )
    finally:
        os.close(first)
        os.close(second)


def test_seen_by_another_node_before_the_crash(lab: Lab, work: Work) -> None:
    """Handed from node to node and changed by both: the first one's data does not come back over the second one's."""
    one, two = bystanders(lab)
    (work[one] / "file").write_bytes(b"first" * 1000)
    with open(work[two] / "file", "r+b") as file:
        assert file.read() == b"first" * 1000
        file.seek(0)
        file.write(b"SECOND")
    kill_home(lab)
    expected = b"SECOND" + (b"first" * 1000)[6:]
    assert within(60, (work[one] / "file").read_bytes) == expected
    assert (work[two] / "file").read_bytes() == expected


def test_open_file_without_a_name(lab: Lab, work: Work) -> None:
    one, _two = bystanders(lab)
    with open(work[one] / "file", "w+b", buffering=0) as file:
        file.write(b"data of a file that has no name")
        os.unlink(work[one] / "file")
        file.write(b", and more")
        kill_home(lab)
        assert within(60, lambda: os.pread(file.fileno(), 100, 0)) == b"data of a file that has no name, and more"


def test_what_mxfs_sync_covered_survives_the_death_of_all(lab: Lab, work: Work) -> None:
    """sync(2) does not reach a FUSE server. The kill follows at once: by itself a node would commit seconds later."""
    home, node, third = lab.home(), *bystanders(lab)
    data = os.urandom(1 << 20)
    fds = {name: os.open(work[name] / name, os.O_WRONLY | os.O_CREAT, 0o644) for name in (home, node)}
    for name, fd in fds.items():
        assert os.pwrite(fd, data, 0) == len(data)
        run_dir = lab.folder / ".lab" / name / "run"
        must([sys.executable, "-m", "mxfsd.cli.mxfs", "sync", "--run-dir", run_dir])
    for name in (node, home, third):  # first who could write it again, then who has it in memory
        lab._mxfs(["lab", "kill", str(lab.folder), name])
    for fd in fds.values():
        with suppress(OSError):
            os.close(fd)
    for name in lab.names:
        lab._mxfs(["lab", "start", str(lab.folder), name])
    assert (work[node] / home).read_bytes() == data
    assert (work[home] / node).read_bytes() == data
