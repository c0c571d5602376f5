"""Exactly once over a crash of the home: nothing answered is lost, nothing is executed twice, on a real XFS.

The machine dies (XFS_IOC_GOINGDOWN without a log flush) before or behind any change, record and force; some time before
that the log may have been forced by chance, which makes a part of an operation durable.
"""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xfsdisk
from oncekit import World

from mxfs_proto.errors import PeerError
from mxfs_proto.ops import Request
from mxfsd import settling
from mxfsd.core.outcomes import Before, Record, RecordKind
from mxfsd.homerole import HomeRole
from mxfsd.oprecords import Key, OpRecords, Slot

pytestmark = [pytest.mark.needs("root", "loop", "xfs"), pytest.mark.error_logs]
LIVES = int(os.environ.get("ONCE_LIVES", "300"))
MUTANT_LIVES = 400


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    with xfsdisk.keep_process(), xfsdisk.xfs_device(tmp_path) as device:
        yield device


async def live(world: World, lives: int) -> None:
    try:
        for _ in range(lives):
            crash_at = world.rng.randint(1, 60)
            flush_at = world.rng.choice((0, crash_at, max(1, crash_at - 1), world.rng.randint(1, crash_at)))
            async with asyncio.timeout(60):
                await world.life(crash_at, flush_at)
        world.start()
    finally:
        await world.close()


async def test_any_crash(device: str) -> None:
    world = World(device, 1)
    await live(world, LIVES)
    assert min(world.settled[what] for what in ("executed", "forgotten")) > LIVES / 20, "crashes must come in between"
    subprocess.run(["xfs_repair", "-n", device], check=True, capture_output=True, timeout=200)


# -- without any one of the steps it is not so -------------------------------------------------------------------------


def no_intent(role: HomeRole, records: OpRecords) -> None:
    records.intend = lambda *_: records._take()  # type: ignore[method-assign]


def no_outcome(role: HomeRole, records: OpRecords) -> None:
    records.outcome = lambda _key, slot, _reply: slot or records._take()  # type: ignore[method-assign]


def outcome_first(role: HomeRole, records: OpRecords) -> None:
    intend = records.intend

    def both(key: Key, request: Request, before: Before) -> Slot:
        slot = intend(key, request, before)
        records._write(slot, Record(RecordKind.OUTCOME, *key, bytes(6)))
        return slot

    records.intend = both  # type: ignore[method-assign]


def no_force(role: HomeRole, _records: OpRecords) -> None:
    async def wait(_ticket: int) -> None: ...

    role.service.forcer.wait = wait  # type: ignore[method-assign]


def answered_all_the_same(role: HomeRole, _records: OpRecords) -> None:
    """Where the mount is shut down."""

    async def forced(ticket: int) -> None:
        try:
            await role.service.forcer.wait(ticket)
        except OSError:
            pass

    role.service.forced = forced  # type: ignore[method-assign]


STEPS = (no_intent, no_outcome, outcome_first, no_force, answered_all_the_same)


@pytest.mark.parametrize("mutant", STEPS)
async def test_a_home_without_a_step_is_caught(device: str, mutant: Callable[[HomeRole, OpRecords], None]) -> None:
    world = World(device, 3, lambda role: mutant(role, role.service.records))  # type: ignore[arg-type]
    # An outcome that was written before anything was done is not even a reply to some operations.
    with pytest.raises((AssertionError, PeerError), match=", not |cut short"):
        await live(world, MUTANT_LIVES)


def forget_all(_lower: Any, _sessions: Any, records: OpRecords, slot: Slot, _record: Record) -> bool:
    records.clear(slot)
    return False


@pytest.mark.parametrize(("step", "instead"), [("_settle_one", forget_all), ("_undo", lambda *_: None)])
async def test_a_takeover_without_a_step_is_caught(
    device: str, monkeypatch: pytest.MonkeyPatch, step: str, instead: Callable[..., Any]
) -> None:
    monkeypatch.setattr(settling, step, instead)
    with pytest.raises(AssertionError, match=", not "):
        await live(World(device, 4), MUTANT_LIVES)
