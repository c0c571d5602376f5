"""The heartbeat process and its client, on an image file; time is real here, but nothing sleeps."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import FakeClock, make_image, open_lockspace

from mxfs_proto.errors import IoFailure
from mxfs_proto.ondisk import Address, LeaseState, SlotRecord, SlotState
from mxfsd.core.lease import HeldSlot, Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.heartbeat import EXIT_PARENT_DIED, arguments
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport, HeartbeatClient, HeartbeatEvent
from mxfsd.io.lockspace import Lockspace

T = Timeouts.named("fast")
JOINER = Joiner(b"m" * 16, "me", 5, (Address("127.0.0.1", 4711),))


class Node:
    """One node on an image: lockspace, heartbeat process and what it said."""

    def __init__(self, image: Path) -> None:
        self.lockspace = Lockspace.open(str(image))
        self.held = self.lockspace.claim_slot(JOINER, T)
        self.events: list[HeartbeatEvent] = []
        self.reports: list[BeatReport] = []
        self.changed = asyncio.Condition()
        self.client = HeartbeatClient(str(image), self.held, T, self._report, self._event)
        self._wake = asyncio.Event()

    def _report(self, report: BeatReport) -> None:
        self.reports.append(report)
        self._wake.set()

    def _event(self, event: HeartbeatEvent) -> None:
        self.events.append(event)
        self._wake.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something that was said makes *true* come true."""
        async with asyncio.timeout(20):
            while not true():
                self._wake.clear()
                await self._wake.wait()

    def said(self, name: str) -> bool:
        return any(event.name == name for event in self.events)

    def slot(self) -> SlotRecord:
        found = self.lockspace.read_slots()[self.held.record.slot - 1]
        assert found is not None
        return found


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(make_image(tmp_path / "disk.img"))
    await made.client.start()
    yield made
    made.client.kill()
    made.lockspace.close()


async def test_beats_and_leaves(node: Node) -> None:
    assert node.slot().state is SlotState.JOINING
    await node.client.set_state(SlotState.ACTIVE)
    await node.client.set_addresses((Address("::1", 9), Address("10.0.0.1", 10)))
    slot = node.slot()
    assert slot.state is SlotState.ACTIVE
    assert slot.addresses == (Address("::1", 9), Address("10.0.0.1", 10))
    counter = slot.counter
    beats = len(node.reports)
    await node.until(lambda: len(node.reports) >= beats + 2)
    assert node.slot().counter >= counter + 2
    own = node.reports[-1].slots[1]
    assert (own.name, own.state, own.addresses) == ("me", SlotState.ACTIVE, slot.addresses)
    await node.client.leave()
    assert node.slot().state is SlotState.LEFT
    assert not node.said("died")
    with pytest.raises(IoFailure):
        await node.client.beat()


async def test_renews_the_home_lease_until_told_not_to(node: Node) -> None:
    lease = await asyncio.to_thread(node.lockspace.claim_lease, node.held.record, T)
    until = await node.client.set_home(lease)
    assert until > now_ms()
    first = node.lockspace.read_lease()
    assert first.epoch == 1
    await node.until(lambda: (r := node.reports[-1].lease) is not None and r.renewals >= first.renewals + 2)
    assert node.slot().is_home
    assert node.reports[-1].lease_until_ms is not None
    until = await node.client.set_home(None)
    stopped = node.lockspace.read_lease()
    given = node.lockspace.give_lease(stopped, until, 0, T)
    await node.client.beat()
    assert node.lockspace.read_lease() == given
    assert given.state is LeaseState.FREE
    assert node.reports[-1].lease_until_ms is None


async def test_does_not_renew_a_lease_of_others(node: Node) -> None:
    lease = await asyncio.to_thread(node.lockspace.claim_lease, node.held.record, T)
    node.lockspace.give_lease(lease.record, lease.since_ms + T.lease_ms, 0, T)
    with pytest.raises(IoFailure, match="not ours"):
        await node.client.set_home(lease)


async def test_lost_lease_is_reported(node: Node) -> None:
    lease = await asyncio.to_thread(node.lockspace.claim_lease, node.held.record, T)
    await node.client.set_home(lease)
    taken = replace(lease.record, epoch=2, nonce=1, owner_slot=9)
    node.lockspace.write_lease(taken)
    await node.until(lambda: node.said("lease_lost"))
    await node.client.beat()
    assert node.lockspace.read_lease() == taken
    assert not node.slot().is_home


async def test_taken_slot_ends_the_process(node: Node) -> None:
    taken = replace(node.slot(), nonce=1, name="thief")
    node.lockspace.write_slot(taken)
    # A beat that had read before our write covers it, as the rules allow: a taker writes only when nobody beats.
    await node.until(lambda: node.said("slot_lost") or _again(node, taken))
    await node.until(lambda: node.said("died"))
    lost = next(event for event in node.events if event.name == "slot_lost")
    assert "thief" in lost.reason
    assert node.slot() == taken


def _again(node: Node, taken: SlotRecord) -> bool:
    if node.slot() != taken:
        node.lockspace.write_slot(taken)
    return False


async def test_stalled_process_claims_its_slot_again(node: Node) -> None:
    """SIGSTOP for longer than self_fence_ms; meanwhile nobody took the slot."""
    before = node.slot()
    os.kill(node.client.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep((T.self_fence_ms + 300) / 1000)
    finally:
        os.kill(node.client.pid, signal.SIGCONT)
    await node.until(lambda: node.said("resumed"))
    after = node.slot()
    assert after.incarnation == before.incarnation
    assert after.nonce != before.nonce
    assert not node.said("slot_lost")


async def test_killed_process_is_noticed(node: Node) -> None:
    os.kill(node.client.pid, signal.SIGKILL)
    await node.until(lambda: node.said("died"))
    assert node.slot().state is SlotState.JOINING


async def test_signals_of_a_service_manager_do_not_end_it(node: Node) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(node.client.pid, number)
    await node.client.beat()
    assert not node.said("died")


async def test_two_nodes_see_each_other(node: Node) -> None:
    """The other one beats on a clock of the test's."""
    clock = FakeClock()
    space = open_lockspace(node.lockspace.disk.path, clock)
    other = space.claim_slot(Joiner(b"o" * 16, "other"), T).record
    await node.client.beat()
    seen = node.reports[-1].slots[other.slot]
    assert (seen.name, seen.incarnation, seen.uuid) == ("other", 1, b"o" * 16)
    await node.until(lambda: node.reports[-1].slots[other.slot].age_ms > T.heartbeat_ms)
    space.write_slot(replace(other, counter=other.counter + 1))
    await node.client.beat()
    assert node.reports[-1].slots[other.slot].age_ms == 0
    space.close()


async def test_unreadable_slot_is_reported(node: Node) -> None:
    with open(node.lockspace.disk.path, "r+b") as file:
        file.seek(node.lockspace.header.lockspace_offset + 20 * 4096)
        file.write(b"garbage")
    await node.client.beat()
    assert "magic" in node.reports[-1].unreadable[5]


def test_daemon_death_is_written_into_the_slot(tmp_path: Path) -> None:
    """The last gasp: a stand-in for the daemon starts the process and is killed."""
    image = make_image(tmp_path / "disk.img")
    clock = FakeClock()
    space = open_lockspace(image, clock)
    record = space.claim_slot(JOINER, T).record
    held = HeldSlot(record, now_ms())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = (
        "import os,subprocess,sys,signal\n"
        "args=[a.replace('PARENT',str(os.getpid())) for a in sys.argv[2:]]\n"
        "subprocess.Popen([sys.executable,*args],pass_fds=[int(sys.argv[1])])\n"
        "signal.pause()\n"
    )
    args = arguments(theirs.fileno(), str(image), held, T, 0)
    args[args.index("--parent") + 1] = "PARENT"
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-c", program, str(theirs.fileno()), *args], pass_fds=[theirs.fileno()]
        ) as daemon,
    ):
        theirs.close()
        ours.settimeout(20)
        while b'"beat"' not in (data := ours.recv(1 << 17)):
            assert b"slot_lost" not in data
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
        # The end of the stream is the end of the heartbeat process.
        while ours.recv(1 << 17):
            pass
    (slot, *_) = space.read_slots()
    assert slot is not None
    assert slot.state is SlotState.FAILED
    # The node comes back at once.
    assert space.claim_slot(JOINER, T).record.slot == record.slot
    space.close()


def test_start_with_a_slot_that_is_not_ours(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img")
    clock = FakeClock()
    space = open_lockspace(image, clock)
    record = space.claim_slot(JOINER, T).record
    space.write_slot(replace(record, nonce=1))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    args = arguments(theirs.fileno(), str(image), HeldSlot(record, now_ms()), T, os.getpid())
    with ours, theirs:
        done = subprocess.run([sys.executable, *args], pass_fds=[theirs.fileno()], check=False, timeout=60)
        assert b"slot_lost" in ours.recv(4096)
    assert done.returncode == 3
    space.close()


def test_start_after_the_daemon_died(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img")
    clock = FakeClock()
    space = open_lockspace(image, clock)
    held = space.claim_slot(JOINER, T)
    space.close()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    args = arguments(theirs.fileno(), str(image), held, T, 1)
    with ours, theirs:
        done = subprocess.run([sys.executable, *args], pass_fds=[theirs.fileno()], check=False, timeout=60)
    assert done.returncode == EXIT_PARENT_DIED
