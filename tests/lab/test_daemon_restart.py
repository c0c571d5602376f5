"""A process of a node is killed while the mount is in use: applications see a pause at most, and nothing is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from labkit import CHANNEL, Lab, running_lab
from test_home_move import Load

from mxfsd import control, mountinfo, procs, rundir

pytestmark = pytest.mark.needs_lab
Work = dict[str, Path]

PAUSE_S = 2.0
"""From the crash of a home's daemon to serving again, with timeouts=fast on a quiet machine."""
SLACK_S = 4.0
"""What a machine that is busy with other tests may add."""


def run_dir(lab: Lab, name: str) -> Path:
    (found,) = (lab.folder / ".lab" / name / "run").glob("*-*-*")
    return found


def status(lab: Lab, name: str) -> dict[str, object]:
    return control.request(run_dir(lab, name) / control.SOCKET_NAME, "status", 3.0)


def serving(lab: Lab, name: str) -> bool:
    with suppress(Exception):
        return status(lab, name).get("state") == "serving"
    return False


def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    assert procs.wait_until(condition, seconds), f"not within {seconds} s"


def timed_crash(lab: Lab, name: str, process: str, probe: Path) -> float:
    """Kill the process; return the seconds until the mount of the same node has made a file again."""
    lab.crash(name, process)
    begun = time.monotonic()
    probe.write_bytes(b"again")
    return time.monotonic() - begun


@pytest.fixture(autouse=True)
def everybody_serves(lab: Lab) -> Iterator[None]:
    wait(lambda: all(serving(lab, name) for name in lab.names))
    yield


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["client", "home"])
def test_daemon_is_killed_under_load(lab: Lab, work: Work, which: str) -> None:
    """Three threads a node work while the daemon of one of them is killed."""
    load = Load(work)
    with load.running():
        load.wait_for_work(20)
        victim = lab.home() if which == "home" else lab.others()[0]
        took = timed_crash(lab, victim, "daemon", work[victim] / "probe")
        load.wait_for_work(20)
    assert load.errors == []
    load.check()
    print(f"{which}: its own node worked again after {took:.2f} s, the longest wait was {load.longest_s:.2f} s")
    assert took < PAUSE_S + SLACK_S


@pytest.mark.timeout(300)
def test_daemons_are_killed_ten_times(lab: Lab, work: Work) -> None:
    """One after the other, homes among them, under load from all nodes."""
    load = Load(work)
    with load.running():
        for turn in range(10):
            load.wait_for_work(5)
            victim = lab.names[turn % len(lab.names)] if turn % 2 else lab.home()
            assert procs.wait_until(lambda name=victim: serving(lab, name), 30), lab.logs()  # type: ignore[misc]
            lab.crash(victim, "daemon")
            back = procs.wait_until(lambda name=victim: serving(lab, name), 30)  # type: ignore[misc]
            assert back, f"{victim} did not come back\n{lab.logs()}"
        load.wait_for_work(10)
    try:
        assert load.errors == []
        load.check()
    except AssertionError:
        print(lab.logs(400))
        raise


@pytest.mark.parametrize("which", ["client", "home"])
def test_heartbeat_is_killed(lab: Lab, work: Work, which: str) -> None:
    """Without it the daemon cannot know whether it may go on: it ends, and the next one goes on."""
    load = Load(work)
    with load.running():
        load.wait_for_work(10)
        victim = lab.home() if which == "home" else lab.others()[0]
        before = rundir.recall(run_dir(lab, victim), rundir.HEARTBEAT)
        lab.crash(victim, "heartbeat")
        wait(lambda: rundir.recall(run_dir(lab, victim), rundir.HEARTBEAT) != before and serving(lab, victim))
        load.wait_for_work(10)
    assert load.errors == []
    load.check()


@pytest.mark.parametrize("which", ["client", "home"])
def test_descriptors_survive(lab: Lab, work: Work, which: str) -> None:
    """Open files of each kind go on: cached, written and not synced, unlinked, appending, a directory."""
    victim = lab.home() if which == "home" else lab.others()[0]
    other = next(name for name in lab.names if name != victim)
    folder = work[victim]
    fds = {}
    try:
        (folder / "file").write_bytes(b"a" * 10_000)
        fds["file"] = os.open(folder / "file", os.O_RDWR)
        os.pwrite(fds["file"], b"before", 0)
        fds["gone"] = os.open(folder / "gone", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fds["gone"], b"unlinked, still open")
        os.unlink(folder / "gone")
        fds["log"] = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fds["log"], b"one\n")
        fds["dir"] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        lab.crash(victim, "daemon")
        assert os.pread(fds["file"], 7, 0) == b"beforea"
        os.pwrite(fds["file"], b"after", 5000)
        assert os.pread(fds["gone"], 100, 0) == b"unlinked, still open"
        os.write(fds["log"], b"two\n")
        assert sorted(os.listdir(fds["dir"])) == ["file", "log"]
        for name in ("file", "gone", "log"):
            os.fsync(fds[name])
        data = (work[other] / "file").read_bytes()
        assert (data[:6], data[5000:5005], len(data)) == (b"before", b"after", 10_000)
        assert (work[other] / "log").read_text() == "one\ntwo\n"
    finally:
        for fd in fds.values():
            os.close(fd)


def test_unsynced_data_of_a_home_that_was_shut_down_without_flush(lab: Lab, work: Work) -> None:
    """What was not synced is lost, as in a power failure: fsync says so once, and old pages are not shown as new."""
    home = lab.home()
    path = work[home] / "file"
    path.write_bytes(b"old" * 1000)
    synced = os.open(work[home] / "synced", os.O_RDWR | os.O_CREAT, 0o600)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.write(synced, b"kept")
        os.fsync(synced)
        os.pwrite(fd, b"NEW" * 1000, 0)
        control.request(run_dir(lab, home) / control.SOCKET_NAME, "crash-lower", 3.0)
        (work[home] / "after").write_bytes(b"x")  # notices, and waits for the next home
        assert os.pread(fd, 3, 0) == b"old"
        with pytest.raises(OSError) as failed:
            os.fsync(fd)
        assert failed.value.errno == errno.EIO
        os.fsync(fd)
        os.fsync(synced)
        assert os.pread(synced, 10, 0) == b"kept"
        assert (work[home] / "after").read_bytes() == b"x"
    finally:
        os.close(fd)
        os.close(synced)


# -- the FUSE process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["client", "home"])
def test_fuse_process_is_killed(lab: Lab, work: Work, which: str) -> None:
    """Its locks are free soon, what it had synced is there, and the same node can mount again."""
    victim = lab.home() if which == "home" else lab.others()[0]
    others = [name for name in lab.names if name != victim]
    fd = os.open(work[victim] / "file", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.write(fd, b"synced")
        os.fsync(fd)
        lab.crash(victim, "fuse")
        begun = time.monotonic()
        for name in others:
            with open(work[name] / "file", "ab") as stream:
                stream.write(name.encode())
        print(f"{which}: the others wrote after {time.monotonic() - begun:.2f} s")
        assert time.monotonic() - begun < PAUSE_S + SLACK_S
        wait(lambda: mountinfo.at(str(lab[victim])) is None)
        with pytest.raises(OSError):
            os.fsync(fd)
    finally:
        with suppress(OSError):
            os.close(fd)
    wait(lambda: rundir.recall(run_dir(lab, victim), rundir.DAEMON) is not None)
    restart(lab, victim)
    assert (work[victim] / "file").read_bytes() == b"synced" + "".join(others).encode()


def restart(lab: Lab, name: str) -> None:
    """Mount again on a node whose mount has ended by itself."""
    daemon = rundir.recall(run_dir(lab, name), rundir.DAEMON)
    wait(lambda: daemon is None or not daemon.alive)
    lab.ended(name)
    lab.start(name)


# -- no daemon comes -------------------------------------------------------------------------------------------------


@contextmanager
def no_daemon_starts(lab: Lab, name: str) -> Iterator[None]:
    """The device is not to be found: every daemon that is started ends with an error."""
    device = next(node["loop"] for node in lab.status()["nodes"] if node["name"] == name)
    os.rename(device, f"{device}.away")
    try:
        yield
    finally:
        os.rename(f"{device}.away", device)


def test_unmount_while_there_is_no_daemon(lab: Lab, work: Work) -> None:
    """umount does not wait for a daemon, nothing is started afterwards, and a mount works."""
    victim = lab.others()[0]
    (work[victim] / "file").write_bytes(b"data")
    with no_daemon_starts(lab, victim):
        lab.crash(victim, "daemon")
        subprocess.run(["umount", "-i", str(lab[victim])], check=True, timeout=10)
        fuse = rundir.recall(run_dir(lab, victim), rundir.FUSE)
        assert fuse is not None
        wait(lambda: not fuse.alive)
    time.sleep(1)  # long enough for a daemon to be started
    daemon = rundir.recall(run_dir(lab, victim), rundir.DAEMON)
    assert daemon is not None
    assert not daemon.alive
    restart(lab, victim)
    assert (work[victim] / "file").read_bytes() == b"data"


WAITS = {
    "mkdir": "os.mkdir(path + '.new')",
    "fsync": "os.fsync(fd)",
    "append": "os.write(fd, b'x')",
    "direct read": "os.pread(fd, 4096, 0)",
    "flock": "__import__('fcntl').flock(fd, 2)",
}
"""What programs wait in, and are killed in."""
_FLAGS = {"append": "os.O_WRONLY | os.O_APPEND", "direct read": "os.O_RDWR | os.O_DIRECT"}


@contextmanager
def waiter(path: Path, what: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that opens the file, and does *what* when it is told to; it is ended at the end."""
    flags = _FLAGS.get(what, "os.O_RDWR")
    script = (
        f"import os, sys; path = {str(path)!r}; fd = os.open(path, {flags}); print(flush=True); input(); {WAITS[what]}"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


@pytest.mark.timeout(200)
def test_a_mount_without_daemon_waits_can_be_interrupted_and_is_dead_in_the_end(lab: Lab, work: Work) -> None:
    """Waiting applications die by SIGKILL; after restart_ms everything fails with EIO, and a mount cleans up."""
    victim = lab.others()[0]
    folder = work[victim]
    errors: list[int | None] = []

    def late() -> None:
        try:
            (folder / "late").write_bytes(b"x")
            errors.append(None)
        except OSError as failed:
            errors.append(failed.errno)

    # pyfuse3 does not say who asks for the others.
    kinds = ["mkdir"] if CHANNEL == "pyfuse3" else list(WAITS)
    for kind in kinds:
        (folder / kind).write_bytes(b"data")
    with ExitStack() as stack:
        children = {kind: stack.enter_context(waiter(folder / kind, kind)) for kind in kinds}
        with no_daemon_starts(lab, victim):
            lab.crash(victim, "daemon")
            begun = time.monotonic()
            waiting = threading.Thread(target=late)
            waiting.start()
            for child in children.values():
                assert child.stdin is not None
                child.stdin.write(b"\n")
                child.stdin.flush()
            time.sleep(1)
            assert {kind: child.poll() for kind, child in children.items()} == dict.fromkeys(kinds)
            for kind, child in children.items():
                child.send_signal(signal.SIGKILL)
                assert child.wait(3) == -signal.SIGKILL, kind
            waiting.join(60)
            print(f"dead after {time.monotonic() - begun:.1f} s")
            assert errors == [errno.EIO]
            with pytest.raises(OSError) as failed:
                os.mkdir(folder / "another")
            assert failed.value.errno == errno.EIO
    lab.ended(victim)
    lab.start(victim)  # over the dead mount
    assert sorted(os.listdir(work[victim])) == sorted(kinds)
    for kind in kinds:
        assert (work[victim] / kind).read_bytes() == b"data"


@pytest.mark.timeout(200)
def test_a_daemon_that_comes_too_late(lab: Lab, work: Work) -> None:
    """It is still starting when the mount is given up: the next mount does not meet it."""
    victim = lab.others()[0]
    (work[victim] / "file").write_bytes(b"data")
    fuse = lab.fuse_pid(victim)
    late: list[int] = []

    def started() -> bool:
        for task in Path(f"/proc/{fuse}/task").iterdir():
            with suppress(OSError):  # a thread that has ended
                late.extend(int(pid) for pid in (task / "children").read_text().split())
        return bool(late)

    lab.crash(victim, "daemon")
    assert procs.wait_until(started, 20)
    found = rundir.process(late[0])
    assert found is not None
    os.kill(late[0], signal.SIGSTOP)
    try:
        wait(lambda: (run_dir(lab, victim) / rundir.DEAD).exists(), 60)
        assert not found.alive
        lab.ended(victim)
        lab.start(victim)
        assert (work[victim] / "file").read_bytes() == b"data"
    finally:
        if found.alive:
            os.kill(late[0], signal.SIGKILL)


@pytest.mark.timeout(200)
def test_a_node_that_was_put_out_meanwhile_does_not_go_on(lab: Lab, work: Work) -> None:
    """Others have been given what it held: its mount is dead, and no daemon is started again and again."""
    victim, home = lab.others()[0], lab.home()
    (work[victim] / "file").write_bytes(b"before")
    fd = os.open(work[victim] / "file", os.O_RDWR)
    try:
        with no_daemon_starts(lab, victim):
            lab.crash(victim, "daemon")
            (work[home] / "file").write_bytes(b"after")  # waits until the node is out
        wait(lambda: (run_dir(lab, victim) / rundir.DEAD).exists())
        with pytest.raises(OSError) as failed:
            os.pread(fd, 10, 0)
        assert failed.value.errno == errno.EIO
        daemon = rundir.recall(run_dir(lab, victim), rundir.DAEMON)
        wait(lambda: daemon is not None and not daemon.alive)
        time.sleep(1)
        assert rundir.recall(run_dir(lab, victim), rundir.DAEMON) == daemon
    finally:
        with suppress(OSError):
            os.close(fd)
    lab.ended(victim)
    lab.start(victim)
    assert (work[victim] / "file").read_bytes() == b"after"


@pytest.mark.timeout(200)
def test_a_home_without_other_nodes() -> None:
    """The daemon that is started again takes the lease back and mounts, and the files go on."""
    with running_lab(count=1) as alone:
        root = alone["n1"]
        fd = os.open(root / "file", os.O_RDWR | os.O_CREAT, 0o644)
        gone = os.open(root / "gone", os.O_RDWR | os.O_CREAT, 0o644)
        os.write(gone, b"unlinked")
        os.unlink(root / "gone")
        try:
            for turn in range(5):
                os.pwrite(fd, b"%d" % turn, turn)  # not synced: the shutdown writes it back
                took = timed_crash(alone, "n1", "daemon", root / f"probe{turn}")
                print(f"serving after {took:.2f} s")
                assert took < PAUSE_S + SLACK_S
                assert os.pread(fd, 10, 0) == "".join(map(str, range(turn + 1))).encode()
                os.fsync(fd)
                assert os.pread(gone, 10, 0) == b"unlinked"
        finally:
            os.close(fd)
            os.close(gone)
        assert json.loads(json.dumps(alone.status()))["epoch"] == 6
