"""A home over a real lower XFS, with nodes that answer blocking ASTs as the test says."""

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Attr, Fid, Op, OpFlag, Request
from mxfsd.core.dlm import Effect, LockMaster
from mxfsd.core.lockeffects import Bast, Deny, Grant, OpDenied, OpGranted
from mxfsd.core.timeouts import Timeouts
from mxfsd.home import INTERNAL_REQ, HomeService, Outcome
from mxfsd.io.lower import Lower

HOME, A, B = 1, 2, 3


class Gate:
    """Stops a thread that runs into it: ``shut`` first, ``entered`` says that one waits, ``open`` lets it go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.fail: OSError | None = None
        self.passed = 0

    def shut(self) -> None:
        self.go.clear()
        self.entered.clear()

    def open(self) -> None:
        self.go.set()

    def __call__(self) -> None:
        self.entered.set()
        assert self.go.wait(20), "nobody opened the gate"
        self.passed += 1
        if self.fail is not None:
            raise self.fail


class GatedLower(Lower):
    """A lower mount whose log forces run through a gate."""

    def __init__(self, mount_fd: int) -> None:
        super().__init__(mount_fd)
        self.gate = Gate()
        self.synced: list[Fid] = []

    def sync(self, fid: Fid) -> None:
        self.gate()
        super().sync(fid)
        self.synced.append(fid)


class Home:
    """The service of node 1. Effects run at once, as in the daemon; a BAST is answered at the loop's next turn."""

    def __init__(self, lower: Lower) -> None:
        self.lower = lower
        self.master = LockMaster(HOME, Timeouts.named("fast"), first_seq=1)
        self.master.grace_over(0)
        self.service = HomeService(lower, self.master, lambda: 0, self.run)
        self.basts: list[Bast] = []
        self.grants: list[Grant] = []
        self.silent: set[int] = set()
        """Nodes that do not answer a BAST."""
        self.opens: dict[tuple[int, int], tuple[int, int]] = {}
        """(node, inode) -> what the node says it has open."""

    def run(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, OpGranted):
                self.service.op_granted(effect.op_id, effect.ino)
            elif isinstance(effect, OpDenied):
                self.service.op_denied(effect.op_id, effect.ino, effect.errno)
            elif isinstance(effect, Bast):
                self.basts.append(effect)
                if effect.node not in self.silent:
                    asyncio.get_running_loop().call_soon(self.give_up, effect)
            elif isinstance(effect, Grant):
                if effect.req_id & INTERNAL_REQ:
                    self.service.internal_grant(effect.req_id, effect.mode, effect.seq)
                else:
                    self.grants.append(effect)
            elif isinstance(effect, Deny) and effect.req_id & INTERNAL_REQ:
                self.service.internal_denied(effect.req_id, effect.errno)

    def give_up(self, bast: Bast) -> None:
        opens = self.opens.get((bast.node, bast.ino), (0, 0))
        self.run(self.master.release(0, bast.node, bast.ino, bast.seq, LockMode.NL, opens))

    def answer_all(self) -> None:
        """The silent nodes answer what they were asked."""
        self.silent.clear()
        basts, self.basts = self.basts, []
        for bast in basts:
            self.give_up(bast)

    def open_at(self, node: int, fid: Fid, readers: int = 1, writers: int = 0) -> None:
        """*node* has the file open (uncached)."""
        self.opens[node, fid.ino] = (readers, writers)
        self.run(self.master.opens_update(0, node, fid.ino, (readers, writers)))

    def start(self, node: int, op: Op, *values: Any, want_lock: bool = False) -> asyncio.Task[Outcome]:
        request = Request(op, OpFlag.WANT_LOCK if want_lock else 0, 0, 0, 0, list(values))
        return asyncio.get_running_loop().create_task(self.service.execute(node, request))

    async def do(self, node: int, op: Op, *values: Any, want_lock: bool = False) -> Outcome:
        async with asyncio.timeout(20):
            return await self.start(node, op, *values, want_lock=want_lock)

    async def make(self, node: int, parent: Fid, name: bytes) -> Fid:
        outcome = await self.do(node, Op.CREATE, *parent, name, 0o644, os.O_EXCL)
        assert outcome.errno == 0
        return fid_of(outcome.values[1])

    def idle(self) -> bool:
        """Nothing is running, waiting or locked by an operation."""
        busy = any(view.waiters or any(holder.op_id for holder in view.holders) for view in self.master.snapshot(0))
        return not (busy or self.service._running or self.service._op_waits or self.service._req_waits)


def fid_of(attr: Attr) -> Fid:
    return Fid(attr.ino, attr.gen)


async def turns(count: int = 50) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0)
