"""How the home puts a node out: fenced first, then its slot taken, and only then is it out."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diskimage
import pytest

from mxfs_proto.errors import IoFailure
from mxfs_proto.ondisk import SlotRecord, SlotState
from mxfsd.core.takeover import Victim
from mxfsd.core.timeouts import Timeouts
from mxfsd.io import clock
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport, SlotView
from mxfsd.io.lockspace import Lockspace
from mxfsd.members import Members

TIMES = Timeouts.derive(heartbeat_ms=40, lease_ms=200, node_dead_ms=600, claim_wait_ms=60)
NODE = b"N" * 16


class Agent:
    """A fencing agent that fails the first *failures* times."""

    name = "test"

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.fenced: list[Victim] = []
        self.events: list[str] = []

    def fence(self, victim: Victim) -> None:
        if self.failures:
            self.failures -= 1
            self.events.append("failed")
            raise IoFailure("not confirmed")
        self.fenced.append(victim)
        self.events.append("fenced")


def seen(
    slot: int, uuid: bytes, incarnation: int, key: int, age_ms: int, state: SlotState = SlotState.ACTIVE
) -> SlotView:
    return SlotView(slot, uuid, f"n{slot}", incarnation, state, 1, 9, age_ms, False, 1, key, ())


class Home:
    def __init__(self, tmp_path: Path, agent: Agent) -> None:
        self.device = str(diskimage.make_image(tmp_path / "disk"))
        self.lockspace = Lockspace.open(self.device)
        self.record = SlotRecord(2, SlotState.ACTIVE, NODE, "n2", 5, 1, 9, pr_key=0xAB)
        self.lockspace.write_slot(self.record)
        self.agent = agent
        self.out: list[tuple[int, int, str]] = []
        self.tasks: list[asyncio.Task[None]] = []
        fencing: Any = agent
        self.members = Members(1, TIMES, self.device, fencing, self._out, lambda: None, self._spawn)
        assert self.members.connected(2, 5, 0) is None

    def _out(self, slot: int, incarnation: int, how: str) -> None:
        self.agent.events.append(f"out, slot {self.slot().state.name}")
        self.out.append((slot, incarnation, how))

    def _spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def slot(self) -> SlotRecord:
        found = self.lockspace.read_slots()[1]
        assert found is not None
        return found

    def report(self, age_ms: int, state: SlotState = SlotState.ACTIVE, *more: SlotView) -> None:
        views = (seen(1, b"H" * 16, 1, 0xCD, 0), seen(2, NODE, 5, 0xAB, age_ms, state), *more)
        self.members.report(BeatReport(1, now_ms(), 1, {view.slot: view for view in views}, None, None, {}))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.members.tick()
                await asyncio.sleep(0.01)


@pytest.mark.error_logs
@pytest.mark.parametrize("failures", [0, 2])
async def test_a_silent_node_is_fenced_before_its_slot_is_taken_and_it_is_out(tmp_path: Path, failures: int) -> None:
    home = Home(tmp_path, Agent(failures))
    home.members.contact(2, 5)
    await home.until(lambda: now_ms() - home.members.heard_ms(2) >= TIMES.lease_ms)
    assert not home.agent.events
    home.report(TIMES.node_dead_ms)
    await home.until(lambda: bool(home.out))
    assert home.agent.events == ["failed"] * failures + ["fenced", "out, slot FREE"]
    assert [victim.pr_key for victim in home.agent.fenced] == [0xAB]
    assert home.out == [(2, 5, "evicted")]
    assert home.slot().incarnation == 5  # a later home sees that this incarnation is out
    assert not home.members.contact(2, 5)
    assert "was put out" in (home.members.connected(2, 5, 0) or "")
    assert "was put out" in (home.members.connected(2, 6, 5) or "")


async def test_a_last_gasp_still_waits_for_the_lease(tmp_path: Path) -> None:
    home = Home(tmp_path, Agent())
    home.members.contact(2, 5)
    heard = home.members.heard_ms(2)
    home.report(0, SlotState.FAILED)
    await home.until(lambda: bool(home.out))
    assert now_ms() - heard >= TIMES.lease_ms
    assert home.agent.events[0] == "fenced"


async def test_a_restarting_node_keeps_its_place_for_a_while(tmp_path: Path) -> None:
    home = Home(tmp_path, Agent())
    home.members.contact(2, 5)
    home.report(TIMES.lease_ms, SlotState.RESTARTING)
    assert home.members.connected(2, 6, 5) is None
    assert home.members.contact(2, 6) and not home.members.contact(2, 5)
    assert not home.tasks


@pytest.mark.error_logs
async def test_nobody_is_put_out_while_the_disk_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path, Agent())
    home.members.disk(True)
    home.report(10 * TIMES.node_dead_ms)
    later = clock.now_ms() + 10 * TIMES.node_dead_ms
    monkeypatch.setattr("mxfsd.members.now_ms", lambda: later)
    home.members.tick()
    assert not home.tasks


@pytest.mark.error_logs
async def test_a_home_that_gave_up_puts_nobody_out(tmp_path: Path) -> None:
    home = Home(tmp_path, Agent(failures=1 << 30))
    home.report(0, SlotState.FAILED)
    await home.until(lambda: bool(home.agent.events))
    home.members.close()
    async with asyncio.timeout(5):
        await asyncio.gather(*home.tasks)
    assert not home.out and home.slot().state is SlotState.ACTIVE


@pytest.mark.parametrize(
    ("claim", "node", "fenced"),
    [
        (seen(3, NODE, 1, 0xAB, TIMES.node_dead_ms, SlotState.CLAIMING), 2, False),
        (seen(3, b"H" * 16, 1, 0xCD, TIMES.node_dead_ms, SlotState.CLAIMING), 1, False),
        (seen(3, NODE, 1, 0xEF, TIMES.node_dead_ms, SlotState.CLAIMING), 2, True),
        (seen(3, NODE, 1, 0xAB, TIMES.node_dead_ms, SlotState.ACTIVE), 2, True),
        (seen(3, NODE, 1, 0xAB, TIMES.node_dead_ms, SlotState.CLAIMING), 0, True),
    ],
    ids=[
        "another node's",
        "our own",
        "of an earlier incarnation",
        "that became a member's",
        "of a node that is dead too",
    ],
)
async def test_a_claim_that_its_node_gave_up_costs_it_nothing(
    tmp_path: Path, claim: SlotView, node: int, fenced: bool
) -> None:
    """It came too late, on a slow disk, and its node took another slot, with the same registration."""
    home = Home(tmp_path, Agent())
    record = SlotRecord(3, claim.state, claim.uuid, "n", claim.incarnation, 1, 9, pr_key=claim.pr_key)
    home.lockspace.write_slot(record)
    home.members.expect(3, claim.incarnation)
    home.report(0 if node else TIMES.node_dead_ms, SlotState.ACTIVE, claim)
    await home.until(lambda: any(slot == 3 for slot, _, _ in home.out))
    assert [victim.pr_key for victim in home.agent.fenced if victim.slot == 3] == ([claim.pr_key] if fenced else [])
    found = home.lockspace.read_slots()[2]
    assert found is not None and found.state is SlotState.FREE
    assert home.members.fenced == len(home.agent.fenced)


@pytest.mark.error_logs
async def test_a_claim_over_a_dead_node_s_slot_does_not_spare_its_fence(tmp_path: Path) -> None:
    """A living node writes a claim too late, over the slot of a node whose fence has not succeeded yet."""
    home = Home(tmp_path, Agent(failures=1))
    home.members.contact(2, 5)
    home.report(TIMES.node_dead_ms)
    await home.until(lambda: bool(home.agent.events))
    claim = SlotView(2, b"H" * 16, "n1", 6, SlotState.CLAIMING, 1, 9, 0, False, 1, 0xCD, ())
    home.members.report(BeatReport(2, now_ms(), 1, {1: seen(1, b"H" * 16, 1, 0xCD, 0), 2: claim}, None, None, {}))
    await home.until(lambda: bool(home.out))
    assert [victim.pr_key for victim in home.agent.fenced][:1] == [0xAB]
