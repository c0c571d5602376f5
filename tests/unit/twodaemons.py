"""Two daemons on one image, without mounts and heartbeat processes, for tests of what they say to each other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import diskimage

from mxfs_proto.ondisk import Address, LeaseState, SlotState
from mxfs_proto.ops import Fid
from mxfsd.core.lease import HeldSlot
from mxfsd.daemon import Daemon
from mxfsd.io.certs import VolumeKeys, make_contexts
from mxfsd.io.clock import now_ms
from mxfsd.io.identity import PeerIdentity
from mxfsd.io.peers import PeerServer
from mxfsd.members import Members
from mxfsd.options import parse

VOLUME = UUID(bytes=diskimage.VOLUME)


class Quiet:
    """Stands in for what a test does not use: FUSE layer, home role. Calls are noted."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.continues = 0
        self.attached = asyncio.Event()
        self.attached.set()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append(name)


class Cluster:
    """A home in slot 1 and a node in slot 2 that share an image; neither has a heartbeat process."""

    def __init__(
        self, tmp_path: Path, home_options: str = "timeouts=fast", node_options: str = "timeouts=fast"
    ) -> None:
        image = str(diskimage.make_image(tmp_path / "disk"))
        self.home = self._daemon(image, f"node=n1,{home_options}", tmp_path / "r1", 1)
        self.node = self._daemon(image, f"node=n2,{node_options}", tmp_path / "r2", 2)
        home: Any = self.home
        home.home = Quiet()
        home.members = Members(1, home.timeouts, home.device, home.fencing, home._node_out, home._cut_off, home.spawn)
        home.epoch, home.home_slot, home.root = 5, 1, Fid(128, 1)
        home._claimed_until_ms = now_ms() + 600_000
        self.lease_ms = home.timeouts.lease_ms

    def _daemon(self, image: str, options: str, run_dir: Path, slot: int) -> Daemon:
        run_dir.mkdir()
        daemon: Any = Daemon(image, "/nowhere", replace(parse(options), state=str(run_dir)), run_dir)
        found = daemon.lockspace.read_slots()[slot - 1]
        record = replace(
            found,
            name=f"n{slot}",
            incarnation=1,
            node_uuid=daemon.identity.node.bytes,
            state=SlotState.ACTIVE,
            counter=1,
        )
        daemon.held = HeldSlot(record, 0)
        daemon.lockspace.write_slot(record)
        daemon.fuse = Quiet()
        self.certify(daemon, diskimage.KEY)
        return daemon  # type: ignore[no-any-return]

    def certify(self, daemon: Any, key: bytes, incarnation: int = 1) -> None:
        who = PeerIdentity(VOLUME, daemon.identity.node, daemon.slot, incarnation)
        daemon.contexts = make_contexts(VolumeKeys.derive(key, VOLUME), who)

    def start(self) -> None:
        """The home listens, publishes its address, and has the lease."""
        home = self.home
        assert home.contexts is not None and home.held is not None
        home.server = PeerServer(home.contexts.server, home._check_peer, home._on_peer)
        [(_, self.port)] = home.server.start([("127.0.0.1", 0)])
        home.lockspace.write_slot(replace(home.held.record, addresses=(Address("127.0.0.1", self.port),), counter=2))
        self.renew()

    def renew(self) -> None:
        """The home renews its lease on the disk."""
        lockspace, held = self.home.lockspace, self.home.held
        lease = lockspace.read_lease()
        assert held is not None
        lockspace.write_lease(
            replace(
                lease,
                sequence=lease.sequence + 1,
                epoch=5,
                state=LeaseState.HELD,
                owner_slot=1,
                owner_uuid=held.record.node_uuid,
                incarnation=held.record.incarnation,
                renewals=lease.renewals + 1,
            )
        )

    def close(self) -> None:
        for daemon in (self.home, self.node):
            if daemon.client is not None:
                daemon.client.close()
            for conn in daemon.peers.values():
                conn.abort()
            if daemon.server is not None:
                daemon.server.close()
            daemon.lockspace.close()


@contextlib.asynccontextmanager
async def cluster(tmp_path: Path, **options: str) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()
        for daemon in (made.home, made.node):
            tasks = list(daemon._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if daemon.finder is not None:
                await daemon.finder.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)
