"""Nodes that fence each other at a real SCSI target: who is shut out, when, and what the others notice of it."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from labkit import Lab, LabError
from test_home_move import Load

from mxfs_proto.ondisk import SlotRecord, SlotState
from mxfsd import control, mountinfo, procs, rundir, spawn
from mxfsd.core.watch import Snapshot
from mxfsd.io.lockspace import Lockspace
from mxfsd.lab import net, target
from mxfsd.lab.state import Paths, lab_id, updating
from mxfsd.pr.errors import PathFailure, ReservationConflict
from mxfsd.pr.iscsi import Iscsi
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.spc import read16, write16

LAB_FENCING = "pr"
LAB_SIZE = "1G"
pytestmark = [pytest.mark.needs_lab, pytest.mark.needs("tgt")]
Work = dict[str, Path]
_T = TypeVar("_T")

BLOCK = 512
DEAD_S = 4.0
"""node_dead_ms of timeouts=fast."""
LIMIT_S = 40.0
"""Far more than anything here takes, also on a busy machine."""


class Witness:
    """One more initiator, registered with nothing, that only looks; and the lockspace."""

    def __init__(self, lab: Lab) -> None:
        self._paths = Paths(lab.folder)
        # Of the node that no test here kills: its device goes with a node.
        self._loop = next(node["loop"] for node in lab.status()["nodes"] if node["name"] == lab.others()[-1])
        # A thread of its own, since a network namespace belongs to a thread.
        self._thread = ThreadPoolExecutor(1, initializer=self._enter)
        self._session: Iscsi | None = None

    def _enter(self) -> None:
        spawn.setns(net.path_of(net.namespace(lab_id(self._paths.root), "br")))

    def _nexus(self) -> ScsiNexus:
        if self._session is None:
            address = target.url(net.BRIDGE_ADDRESS)
            self._session = Iscsi(address, initiator="iqn.2026-11.net.mxfs.test:witness", timeout_ms=5000)
        return ScsiNexus(self._session)

    def _do(self, act: Callable[[], _T]) -> _T:
        return self._thread.submit(act).result(LIMIT_S)

    def close(self) -> None:
        if self._session is not None:
            self._do(self._session.close)
        self._thread.shutdown()

    def registered(self) -> tuple[int, ...]:
        return self._do(lambda: self._nexus().read_keys().keys)

    def type(self) -> int:
        held = self._do(lambda: self._nexus().read_reservation())
        return held.type if held is not None else 0

    def refused(self) -> bool:
        """Whether the target refuses both reading and writing to who is not registered."""

        def attempt() -> bool:
            answers = []
            for command, data, room in ((read16(0, 1), b"", BLOCK), (write16(0, 1), bytes(BLOCK), 0)):
                try:
                    self._nexus().run(command, data, room)
                    answers.append(False)
                except ReservationConflict:
                    answers.append(True)
            return all(answers)

        return self._do(attempt)

    def _look(self) -> Snapshot:
        lockspace = Lockspace.open(self._loop, readonly=True)
        try:
            return lockspace.snapshot()
        finally:
            lockspace.close()

    def snapshot(self) -> tuple[int, dict[str, SlotRecord]]:
        """The slot that owns the lease, and the slots by node name."""
        snap = self._look()
        assert snap.lease is not None
        return snap.lease.owner_slot, {slot.name: slot for slot in snap.slots if slot is not None and slot.name}

    def slot(self, name: str) -> SlotRecord:
        return self.snapshot()[1][name]

    def leave_claim(self, number: int, node: SlotRecord) -> None:
        """Write a claim of another slot by this node, of which it knows nothing any more."""
        lockspace = Lockspace.open(self._loop)
        try:
            old = lockspace.snapshot().slot(number)
            assert old is not None and old.state is SlotState.FREE
            # Without a name: the slots of these tests are told apart by the names of their nodes.
            claim = replace(node, slot=number, name="", state=SlotState.CLAIMING, is_home=False)
            lockspace.write_slot(replace(claim, incarnation=1, counter=1))
            lockspace.disk.sync()
        finally:
            lockspace.close()

    def free(self, numbers: Iterable[int]) -> bool:
        """Whether these slots are free."""
        snap = self._look()
        return all((slot := snap.slot(number)) is not None and slot.state is SlotState.FREE for number in numbers)

    def in_order(self) -> bool:
        """The reservation is as it must be, and exactly the nodes that are up are registered."""
        with suppress(PathFailure):
            live = {slot.pr_key for slot in self.snapshot()[1].values() if slot.state is SlotState.ACTIVE}
            return self.type() == 8 and set(self.registered()) == live and self.refused()
        return False


@pytest.fixture
def witness(lab: Lab) -> Iterator[Witness]:
    seen = Witness(lab)
    try:
        wait(lambda: all(serving(lab, name) for name in lab.names))
        wait(seen.in_order)
        yield seen
    finally:
        seen.close()


def wait(condition: Callable[[], bool], seconds: float = LIMIT_S) -> None:
    assert procs.wait_until(condition, seconds), f"not within {seconds} s"


def run_dir(lab: Lab, name: str) -> Path:
    (found,) = (lab.folder / ".lab" / name / "run").glob("*-*-*")
    return found


def serving(lab: Lab, name: str) -> bool:
    with suppress(Exception):
        return control.request(run_dir(lab, name) / control.SOCKET_NAME, "status", 3.0).get("state") == "serving"
    return False


def log_of(lab: Lab, name: str) -> str:
    return (run_dir(lab, name) / "daemon.log").read_text(errors="replace")


def position(text: str, event: str) -> int:
    """Where the last line with that event is; an assertion where there is none."""
    found = [match.start() for match in re.finditer(rf"\b{event}\b", text)]
    assert found, f"no {event!r} in the log"
    return found[-1]


class Acked:
    """Creates and synced writes of some nodes, each noted when it was answered."""

    def __init__(self, work: Work, nodes: list[str]) -> None:
        self.work, self.nodes = work, nodes
        self.synced: dict[str, bytes] = {}
        self.made: list[str] = []
        self.errors: list[str] = []
        self.count = dict.fromkeys(nodes, 0)
        self._stop = threading.Event()

    def _forever(self, node: str) -> None:
        try:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                folder = self.work[node]
                os.mkdir(folder / f"{node}-d{number}")
                self.made.append(f"{node}-d{number}")
                content = f"{node} {number} ".encode() * 500
                with open(folder / f"{node}-f{number}", "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self.synced[f"{node}-f{number}"] = content
                self.count[node] += 1
        except OSError as failed:
            self.errors.append(f"{node}: {failed}")

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._forever, args=(node,), daemon=True) for node in self.nodes]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(LIMIT_S)
            self.errors += [f"{thread.name} hangs" for thread in threads if thread.is_alive()]

    def more(self, each: int) -> None:
        goal = {node: done + each for node, done in self.count.items()}
        wait(lambda: bool(self.errors) or all(self.count[node] >= goal[node] for node in goal))

    def check(self, folder: Path) -> None:
        assert self.errors == []
        there = set(os.listdir(folder))
        assert there >= {*self.made, *self.synced}
        for name, content in self.synced.items():
            assert (folder / name).read_bytes() == content, name


@pytest.mark.timeout(200)
def test_the_home_is_killed(lab: Lab, work: Work, witness: Witness) -> None:
    """Its key is gone before another one has the lease; everything acknowledged is there; it can come back."""
    home = lab.home()
    others = lab.others()
    dead = witness.slot(home)
    assert dead.pr_key in witness.registered()
    acked = Acked(work, others)
    early: list[int] = []

    def taken_over() -> bool:
        owner, _ = witness.snapshot()
        # The lease first: were the key seen before, the fence might have come in between.
        if owner != dead.slot and dead.pr_key in witness.registered():
            early.append(owner)
        return owner not in (0, dead.slot)

    with acked.running():
        acked.more(5)
        lab.kill(home)
        wait(taken_over)
        assert early == [], "the lease was taken while the home before could still write"
        acked.more(5)
    now = lab.home()
    assert now in others
    assert dead.pr_key not in witness.registered()
    assert witness.type() == 8
    assert witness.refused()
    log = log_of(lab, now)
    assert position(log, "fencing the home") < position(log, "home fenced") < position(log, "lease claimed")
    lab.start(home)
    for node in lab.names:
        acked.check(work[node])
    wait(witness.in_order)
    assert witness.slot(home).pr_key not in (0, dead.pr_key)
    assert witness.slot(home).pr_key in witness.registered()


@pytest.mark.timeout(200)
def test_claims_that_living_nodes_gave_up_do_not_hinder_a_takeover(lab: Lab, work: Work, witness: Witness) -> None:
    """A claim written too late stays on the disk, with the registration of the node, which took another slot."""
    home, others = lab.home(), lab.others()
    keys = {name: witness.slot(name).pr_key for name in others}
    for number, name in enumerate(others, 30):
        witness.leave_claim(number, witness.slot(name))
    acked = Acked(work, others)
    with acked.running():
        acked.more(5)
        lab.kill(home)
        wait(lambda: lab.home() in others)
        acked.more(5)
    assert acked.errors == []
    assert {name: witness.slot(name).pr_key for name in others} == keys
    assert set(keys.values()) == set(witness.registered())
    wait(lambda: witness.free(range(30, 30 + len(others))))
    lab.start(home)
    for node in lab.names:
        acked.check(work[node])
    wait(witness.in_order)


@pytest.mark.timeout(200)
def test_a_client_is_killed(lab: Lab, work: Work, witness: Witness) -> None:
    """The home puts it out: key preempted, slot free, locks given to others."""
    home, (victim, other) = lab.home(), lab.others()
    dead = witness.slot(victim)
    acked = Acked(work, [home, other])
    with acked.running():
        (work[victim] / "held").write_bytes(b"from the victim")
        fd = os.open(work[victim] / "held", os.O_RDWR)
        try:
            os.fsync(fd)
            os.pwrite(fd, b"FROM", 0)  # an exclusive lock, and data that nobody was promised
            lab.kill(victim)
        finally:
            with suppress(OSError):
                os.close(fd)
        with open(work[other] / "held", "ab") as file:  # waits until the lock is free
            file.write(b", and from another")
        assert dead.pr_key not in witness.registered(), "its lock was given away while it could still write"
        wait(lambda: witness.slot(victim).state is SlotState.FREE)
        acked.more(3)
    acked.check(work[home])
    data = (work[home] / "held").read_bytes()
    assert data.lower() == b"from the victim, and from another"
    assert witness.type() == 8
    assert witness.refused()
    assert lab.home() == home
    lab.start(victim)
    assert (work[victim] / "held").read_bytes() == data
    wait(witness.in_order)
    assert witness.slot(victim).pr_key != dead.pr_key


@pytest.mark.timeout(200)
def test_the_target_restarts_under_the_volume(lab: Lab, work: Work, witness: Witness) -> None:
    """It has forgotten everything: all wait, register again under the same keys, and go on."""
    before = {name: slot.pr_key for name, slot in witness.snapshot()[1].items()}
    load = Load(work)
    home = lab.home()
    with load.running():
        load.wait_for_work(5)
        seen = len(log_of(lab, home))
        restart = "import sys; from mxfsd.lab import lab, target; l = lab.Lab(sys.argv[1]); "
        restart += "target.end(l.paths.mark('target')); l.target(sys.argv[2]).start()"
        command = [sys.executable, "-c", restart, str(lab.folder), lab_id(Paths(lab.folder).root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr
        wait(witness.in_order)
        wait(lambda: "the reservation is there again" in log_of(lab, home)[seen:])
        load.wait_for_work(5)
    assert load.errors == []
    load.check()
    log = log_of(lab, home)[seen:]
    assert position(log, "frozen until it is there again") < position(log, "the reservation is there again")
    assert {name: slot.pr_key for name, slot in witness.snapshot()[1].items()} == before
    assert set(witness.registered()) == {key for key in before.values() if key}
    assert lab.home() == home


@pytest.mark.timeout(200)
def test_a_client_that_was_stopped_comes_too_late(lab: Lab, work: Work, witness: Witness) -> None:
    """Stopped for longer than a dead node's time, it is fenced; woken, all it does fails, and nothing of it arrives."""
    home, (victim, other) = lab.home(), lab.others()
    dead = witness.slot(victim)
    path = work[victim] / "held"
    path.write_bytes(b"old" * 3000)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.pwrite(fd, b"BAD" * 1000, 0)
        with stopped(lab, victim):
            with open(work[other] / "held", "r+b") as file:
                file.write(b"new" * 1000)
            assert dead.pr_key not in witness.registered(), "its lock was given away while it could still write"
            wait(lambda: witness.slot(victim).state is SlotState.FREE)
            assert set(witness.registered()) == {witness.slot(name).pr_key for name in (home, other)}
        assert refused_io(lambda: os.fsync(fd)) == errno.EIO
        assert refused_io(lambda: os.pwrite(fd, b"BAD", 0) and os.fsync(fd)) in (errno.EIO, errno.ENOTCONN)
        assert refused_io(lambda: os.mkdir(work[victim] / "bad")) in (errno.EIO, errno.ENOTCONN)
    finally:
        with suppress(OSError):
            os.close(fd)
    daemon = rundir.recall(run_dir(lab, victim), rundir.DAEMON)
    wait(lambda: daemon is None or not daemon.alive)
    assert dead.pr_key not in witness.registered()
    for name in (home, other):
        assert sorted(os.listdir(work[name])) == ["held"]
        assert (work[name] / "held").read_bytes() == b"new" * 1000 + b"old" * 2000
    lab.ended(victim)
    lab.start(victim)
    assert (work[victim] / "held").read_bytes() == b"new" * 1000 + b"old" * 2000
    wait(witness.in_order)


def refused_io(act: Callable[[], Any]) -> int | None:
    """The errno that *act* fails with, None where it succeeds."""
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(act).result(LIMIT_S)
        except OSError as failed:
            return failed.errno
    return None


@contextmanager
def stopped(lab: Lab, name: str) -> Iterator[None]:
    """Every process of the node is stopped. Nobody may touch its mount meanwhile: that would wait."""
    mark = Paths(lab.folder).mark(name)
    pids = procs.marked(mark)
    assert len(pids) >= 3, "daemon, heartbeat process and FUSE layer"
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            procs.send(pid, number, lambda pid: procs.has_mark(pid, mark))
        if number == signal.SIGSTOP:
            try:
                yield
            except BaseException:
                for pid in pids:
                    procs.send(pid, signal.SIGCONT, lambda pid: procs.has_mark(pid, mark))
                raise


def test_who_leaves_takes_its_registration_back(lab: Lab, witness: Witness) -> None:
    """Also the home, which hands over first."""
    home = lab.home()
    key = witness.slot(home).pr_key
    assert key in witness.registered()
    lab.stop(home)
    assert key not in witness.registered()
    wait(witness.in_order)
    lab.start(home)
    wait(witness.in_order)


def test_nodes_with_another_agent_are_refused(lab: Lab, witness: Witness) -> None:
    """One that would not be fenced at the disk may not take part."""
    victim = lab.others()[0]
    lab.stop(victim)
    with updating(Paths(lab.folder)) as state:
        everybody, state.options = state.options, "fencing=lease"
    try:
        with pytest.raises(LabError) as caught:
            lab.start(victim)
    finally:
        with updating(Paths(lab.folder)) as state:
            state.options = everybody
    (line,) = str(caught.value).partition("stderr: ")[2].strip().splitlines()
    assert f"node {victim} has fencing=lease, home {lab.home()} has fencing=pr: use the same" in line
    assert mountinfo.at(str(lab[victim])) is None
    lab.start(victim)
    wait(witness.in_order)


def test_a_device_without_reservations(lab: Lab, witness: Witness) -> None:
    """``fencing=pr`` is refused in one line, and changes nothing."""
    victim = lab.others()[0]
    lab.stop(victim)
    with updating(Paths(lab.folder)) as state:
        everybody, state.options = state.options, "fencing=pr"
    try:
        with pytest.raises(LabError) as caught:
            lab.start(victim)
    finally:
        with updating(Paths(lab.folder)) as state:
            state.options = everybody
    (line,) = str(caught.value).partition("stderr: ")[2].strip().splitlines()
    loop = next(node["loop"] for node in lab.status()["nodes"] if node["name"] == victim)
    assert f"fencing=pr: {loop} is a loop device; mount with fencing=lease, or on a disk" in line
    assert json.loads(json.dumps(lab.status()))["home"] != victim
    lab.start(victim)
    wait(witness.in_order)
