"""The daemon of one volume on one node: joins, becomes home or client, changes between the two, leaves.

Order that keeps data safe at a change of home: hold operations back; end those that run; unmount, and prove it by an
exclusive open of the device; only then give the lease away. The next home claims the lease (epoch + 1), mounts, hears
from every node what it holds, and only then serves.
"""

import asyncio
import errno
import fcntl
import os
import signal
import struct
import uuid
from pathlib import Path
from typing import Any

import structlog

from mxfs_proto.discovery import Announcement
from mxfs_proto.errors import IoFailure, MisuseError, MxfsError, PeerError, Refusal
from mxfs_proto.frames import (
    Frame,
    FrameType,
    LeaseAck,
    pack_json,
    pack_lease_ack,
    pack_lock,
    unpack_json,
    unpack_lease,
    unpack_lock,
)
from mxfs_proto.ondisk import Address, SlotState
from mxfs_proto.ops import Fid
from mxfs_proto.records import LockRecord, NodeState, NodeStatus, Record
from mxfsd import greeting, metricsserver, procs, reattach, rundir
from mxfsd import log as logging
from mxfsd.clientrole import ClientRole
from mxfsd.control import ControlServer
from mxfsd.core.lease import ENDED, HeldLease, HeldSlot, Joiner
from mxfsd.core.sessions import SessionTable
from mxfsd.core.timeouts import Timeouts
from mxfsd.direct import DirectConnections, check_operation
from mxfsd.fencing import Fencing, choose
from mxfsd.fencing import leave as leave_fencing
from mxfsd.figures import Figures
from mxfsd.finder import Finder
from mxfsd.fuselink import FuseLink
from mxfsd.growth import grow_lower
from mxfsd.guard import check_watchdog
from mxfsd.homerole import HomeRole
from mxfsd.identity import Identity, load_identity
from mxfsd.io import libc
from mxfsd.io.addresses import own_addresses
from mxfsd.io.certs import NodeContexts, VolumeKeys, make_contexts
from mxfsd.io.clock import now_ms
from mxfsd.io.heartbeat_client import BeatReport, HeartbeatClient, HeartbeatEvent
from mxfsd.io.identity import PeerIdentity
from mxfsd.io.lockspace import Lockspace
from mxfsd.io.lower import Lower
from mxfsd.io.peers import PeerConnection, PeerServer
from mxfsd.io.servicemanager import ServiceManager
from mxfsd.io.xfsknobs import bound_replay
from mxfsd.members import Members
from mxfsd.operators import Operators
from mxfsd.options import MountOptions
from mxfsd.pr.errors import Preempted
from mxfsd.pr.reservations import Standing
from mxfsd.report import in_words
from mxfsd.settling import recover_sessions
from mxfsd.takeover import Succession

log = structlog.get_logger(__name__)

_TRIAL_TRIES = 100
_TRIAL_WAIT_S = 0.05
_TICK_S = 0.25
_NAMED = 8
_XFS_IOC_GOINGDOWN = 0x8004587D
_NO_LOG_FLUSH = struct.pack("=I", 2)


class Daemon:
    """One volume, one node."""

    def __init__(
        self,
        device: str,
        mountpoint: str,
        options: MountOptions,
        run_dir: Path,
        *,
        supervised: bool = False,
        goes_on_with: int = 0,
        manager: ServiceManager | None = None,
    ) -> None:
        self.supervised = supervised
        """systemd starts it again where it fails."""
        self.goes_on_with = goes_on_with
        """The pid of the FUSE layer that started it, the only one that it may serve; 0: mount.mxfs or systemd did."""
        self.manager = manager or ServiceManager()
        self.device = device
        self.mountpoint = mountpoint
        self.options = options
        self.run_dir = run_dir
        self.timeouts = Timeouts.named(options.timeouts)
        # Before anything is read: a reservation shuts out who is not registered.
        self.fencing: Fencing = choose(device, options)
        try:
            self.lockspace = Lockspace.open(device)
        except BaseException:
            leave_fencing(self.fencing)
            raise
        self.volume = uuid.UUID(bytes=self.lockspace.volume)
        self.identity: Identity = load_identity(run_dir, options, self.volume)
        self.name = options.node or self.identity.name
        self.held: HeldSlot | None = None
        self.heartbeat: HeartbeatClient | None = None
        self.contexts: NodeContexts | None = None
        self.server: PeerServer | None = None
        self.finder: Finder | None = None
        self.fuse: FuseLink | None = None
        self.control: ControlServer | None = None
        self.metrics: metricsserver.MetricsServer | None = None
        self.home: HomeRole | None = None
        self.client: ClientRole | None = None
        self.epoch = 0
        self.home_slot = 0
        self.root = Fid(0, 0)
        self.peers: dict[int, PeerConnection] = {}
        self._named: dict[int, PeerConnection] = {}
        """Connections over which the node has named all that it holds."""
        self.direct = DirectConnections()
        self.members: Members | None = None
        """Who takes part; known to the home alone."""
        self.succession = Succession(self)
        self.figures = Figures()
        self.serving = False
        self._leaving_home = False
        """The home is being given away: it must not begin to serve again by itself."""
        self.evicted: set[tuple[int, int]] = set()
        self.client_lease_until_ms = 0
        self._claimed_until_ms = 0
        self._frozen: HomeRole | None = None
        """The home that serves nobody until the reservation on the disk is there again."""
        self.stopping: asyncio.Future[str] | None = None
        self.failed = False
        """This daemon has to end at once, as in a crash; the FUSE layer waits for the next one."""
        self.ending = False
        """It shuts the lower mount down just now, and ends then."""
        self._exclusive_fd = -1
        self._lower: Lower | None = None
        self._disk_away = False
        self._stepping_down = False
        self._lower_left: asyncio.Future[dict[str, Any]] | None = None
        self.held_by = ""
        """Why this node, the home, could not give it away the last time."""
        self._moving = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def slot(self) -> int:
        """This node's slot, 1..64."""
        assert self.held is not None
        return self.held.record.slot

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine in the background; an error of it is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background work failed", exc_info=task.exception())
            self.fail(f"internal error: {task.exception()}")

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the volume and mount. Raises an MxfsError with a one-line reason; then call ``shut_down``."""
        loop = asyncio.get_running_loop()
        self.stopping = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, "asked to stop")
        logging.context.volume = str(self.volume)
        logging.context.node = self.name
        self.fuse = FuseLink(self.run_dir, self.volume, self._on_fuse_frame, self._on_fuse_record, self._on_fuse_gone)
        self.fuse.on_broken = self.fail
        kernel = [word for word in self.options.kernel if word not in ("sync", "dirsync")]
        if self.options.read_only:
            kernel.append("ro")
        if self.options.watchdog is not None:
            check_watchdog(self.options.watchdog)
        self.metrics = await metricsserver.begin(self)
        await reattach.start_fuse(self, tuple(kernel))
        if self.fencing.warning:
            log.warning(self.fencing.warning)
        # A new incarnation tells the others that the one before has ended, its lower mount too: that must be so.
        if not await self._unmounted():
            left = "perhaps by what is left of an earlier mount: end that first"
            raise IoFailure(f"{self.device} is in use on this host, {left}", errno.EBUSY)
        last = self.identity.last_incarnation
        joiner = Joiner(self.identity.node.bytes, self.name, pr_key=self.fencing.key, last_incarnation=last)
        self.held = await asyncio.to_thread(self.lockspace.claim_slot, joiner, self.timeouts)
        self.identity.save(self.held.record.incarnation)
        self.figures.joined(self.slot, self.name)
        reattach.check_slot(self)
        who = PeerIdentity(self.volume, self.identity.node, self.slot, self.held.record.incarnation)
        keys = VolumeKeys.derive(self.lockspace.header.cluster_key, self.volume)
        self.contexts = make_contexts(keys, who)
        self.server = PeerServer(self.contexts.server, self._check_peer, self._on_peer)
        bound = self.server.start([("0.0.0.0", self.options.port or 0)])
        calls = (self._on_report, self._on_heartbeat)
        self.heartbeat = HeartbeatClient(
            self.device,
            self.held,
            self.timeouts,
            *calls,
            watchdog=self.options.watchdog or "",
            run_dir=str(self.run_dir),
        )
        await self.heartbeat.start()
        rundir.remember(self.run_dir, rundir.HEARTBEAT, self.heartbeat.pid)
        addresses = tuple(Address(host, bound[0][1]) for host in own_addresses(self.options.iface))
        await self.heartbeat.set_addresses(addresses)
        await self._start_finder(keys, addresses[0])
        self.control = ControlServer(self.run_dir / "control.sock", Operators(self).handlers())
        await self.control.start()
        await self._settle()
        await self.heartbeat.set_state(SlotState.ACTIVE)
        self.spawn(self._ticks())
        self.spawn(self._guard())
        log.info("joined", slot=self.slot, home=self.home_slot, addresses=[str(a) for a in addresses])
        await self._until_mounted()
        await self.heartbeat.watch_fuse(self.fuse.pid, self.fuse.take_cache_fds())

    async def _start_finder(self, keys: VolumeKeys, address: Address) -> None:
        def describe() -> Announcement:
            assert self.held is not None
            home = self.home_slot if self.home is not None or self.home_slot != self.slot else 0
            who = (self.volume, self.identity.node, self.slot, self.held.record.incarnation)
            return Announcement(*who, address.host, address.port, home, self.epoch)

        self.finder = Finder(self.options, keys, self.timeouts.announce_ms, describe, self._on_home_announced)
        await self.finder.start()
        self.spawn(self.finder.run())

    def _on_home_announced(self, slot: int, epoch: int) -> None:
        if self.client is not None:
            self.client.home_announced(slot, epoch)

    async def pause(self, seconds: float) -> None:
        """Wait so long before the next attempt to find the home, less when a home announces itself."""
        await (self.finder.pause(seconds) if self.finder is not None else asyncio.sleep(seconds))

    async def _until_mounted(self) -> None:
        assert self.fuse is not None and self.stopping is not None
        await asyncio.wait((self.fuse.mounted, self.stopping), return_when=asyncio.FIRST_COMPLETED)
        if not self.fuse.mounted.done():
            raise IoFailure(self.stopping.result())
        self.fuse.mounted.result()

    async def run(self) -> str:
        """Serve until told to stop; return why."""
        assert self.stopping is not None
        return await self.stopping

    def stop(self, reason: str) -> None:
        """Begin to leave."""
        if self.stopping is not None and not self.stopping.done():
            self.stopping.set_result(reason)

    def fail(self, reason: str) -> None:
        """End as if killed: what this node holds stays its own, and the FUSE layer goes on with the next daemon.

        Where nothing is mounted yet there is nothing to go on with: this is an ordinary end then.
        """
        self.failed = self.fuse is not None and self.fuse.served and not self.fuse.gone.is_set()
        self.stop(reason)

    @property
    def adopted(self) -> bool:
        """Whether there is a FUSE layer of an earlier daemon's that this one was to go on with."""
        return self.fuse is not None and self.fuse.adopted and not self.fuse.gone.is_set()

    def refused(self, reason: str) -> None:
        """This node was put out of the volume: the mount is dead until it is mounted again."""
        if self.fuse is not None:
            self.fuse.refuse(reason)
        self.stop(reason)

    async def shut_down(self) -> None:
        """Leave the volume in good order: a home hands over, or unmounts and frees the lease."""
        await self._caches_ended()
        async with self._moving:
            pass  # a home that is being taken is taken first: given up half way, it would have to be fenced
        if self.home is not None:
            await self._leave_as_home()
        if self.client is not None:
            self.client.close()
            self.client = None
        for task in list(self._tasks):
            task.cancel()
        for conn in list(self.peers.values()):
            conn.close()
        if self.finder is not None:
            await self.finder.close()
        if self.server is not None:
            self.server.close()
        if self.fuse is not None:
            self.fuse.close()
        if self.control is not None:
            await self.control.close()
        if self.metrics is not None:
            await self.metrics.close()
        if self.heartbeat is not None:
            try:
                await self.heartbeat.leave()
            except MxfsError as exc:
                log.warning("the slot could not be marked as left", reason=str(exc))
        elif self.held is not None:
            await asyncio.to_thread(self.lockspace.release_slot, self.held.record)
        self._release_device()
        self.lockspace.close()
        if self._lower is None:  # else something may still be written, and our key says whose it is
            await asyncio.to_thread(leave_fencing, self.fencing)

    async def _caches_ended(self) -> None:
        """Before a node whose FUSE layer is dead says good-bye: nothing that its kernel cached can be read any more."""
        if self.fuse is None or not self.fuse.gone.is_set() or self.heartbeat is None:
            return
        try:
            await self.heartbeat.caches_ended()
        except MxfsError as exc:
            log.warning("the caches of the mount may outlive it; its lease ends first", reason=str(exc))
            await asyncio.sleep(self.timeouts.lease_ms / 1000)

    async def _leave_as_home(self) -> None:
        """Hand over to another node where there is one, else unmount and free the lease."""
        others = [slot for slot, conn in self.peers.items() if not conn.closed]
        try:
            for slot in sorted(others):
                if await self.move_home(slot):
                    return
            await self.move_home(0)
        except MxfsError as exc:
            log.error("the home could not be given up in good order", reason=str(exc))

    # -- which role ------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Become the home where there is none, else a client of it."""
        client = ClientRole(self)
        while not await self.succession.attempt() and not await self._become_client(client):
            await self.pause(self.timeouts.heartbeat_ms / 2000)

    async def _become_client(self, client: ClientRole) -> bool:
        """Connect to the home; False where it is not to be reached just now. Raises Refusal."""
        try:
            await client.connect()
        except Refusal:
            raise
        except MxfsError as exc:
            log.info("home not reached", reason=str(exc))
            return False
        self.client = client  # at once: our FUSE layer answers soon
        self.succession.heard()
        self._hold_device()
        await asyncio.to_thread(self.lockspace.check_place)
        return True

    # The steps of a takeover, in their order; ``mxfsd/takeover.py`` calls them.

    async def mount_as_home(self, held: HeldLease) -> None:
        """With the lease in hand: mount the lower XFS, which replays its log."""
        assert self.heartbeat is not None
        self._claimed_until_ms = await self.heartbeat.set_home(held)
        self.epoch = held.record.epoch
        self.home_slot = self.slot
        logging.context.epoch = self.epoch
        self.serving = False
        self._leaving_home = False
        self._release_device()
        lower = await asyncio.to_thread(reattach.patiently, self._mount, self.timeouts.lease_ms)
        await self._arm(lower)
        if not self.options.read_only:
            await asyncio.to_thread(grow_lower, lower.mount_fd, self.lockspace)
        self._lower = lower
        self.root = lower.root
        self.members = Members(
            self.slot, self.timeouts, self.device, self.fencing, self._node_out, self._cut_off, self.spawn
        )

    async def settle_operations(self) -> None:
        """Find out what became of the operations that were under way; then this node masters the locks."""
        assert self._lower is not None
        sessions = SessionTable()
        records = None
        if not self.options.read_only:
            records = recover_sessions(self._lower, sessions, self.lockspace.volume_id).records
        self.home = HomeRole(
            self.slot,
            self.epoch,
            self._lower,
            self.timeouts,
            sessions,
            self.options.read_only,
            self._send_lock,
            self._send_reply,
            self._on_silent,
            records,
            self._lower_failed,
            self.figures,
            self._is_fenced,
        )

    def _lower_failed(self, reason: str) -> None:
        """The lower mount can be relied on no more: nothing more of it may be seen, here or on the disk."""
        if self.ending:
            return  # it is this daemon that shuts it down, with a flush
        try:
            self.crash_lower()
        except OSError as exc:
            log.warning("the lower mount cannot be shut down", reason=str(exc))
        self.fail(reason)

    def await_reclaims(self, nodes: frozenset[int]) -> None:
        """Tell the nodes that there is a home, and hear what they hold; our own FUSE layer too."""
        assert self.fuse is not None
        if self.finder is not None:
            self.finder.announce_soon()
        log.info("home", epoch=self.epoch, awaited=sorted(nodes))
        if self.fuse.attached.is_set():
            self.fuse.freeze(self.epoch, self.slot)
        else:
            self._welcome_fuse()

    def serve(self) -> None:
        """All have said what they hold, or are out: begin."""
        assert self.home is not None
        self.serving = True
        self.home.forget_sessions()
        self.home.grace_over()
        self._resume_all()
        self.home.service.reap_all()
        log.info("serving", epoch=self.epoch, took_ms=self.succession.took_ms)

    def _mount(self, *, exclusive: bool = True) -> Lower:
        lower = Lower(libc.mount_detached(self.device, self.options.read_only, exclusive=exclusive))
        if not self.options.read_only:
            lower.prepare()
            bound_replay()
        return lower

    async def _arm(self, lower: Lower) -> None:
        """Before anybody is served: have the heartbeat process shut the mount down when the lease is over."""
        assert self.heartbeat is not None
        try:
            await self.heartbeat.arm(lower.mount_fd)
        except MxfsError:
            lower.close()
            raise

    def _welcome_fuse(self) -> None:
        assert self.fuse is not None
        self.fuse.welcome(
            {
                "node": self.slot,
                "name": self.name,
                "epoch": self.epoch,
                "home": self.home_slot,
                "root": list(self.root),
                "kernel_cache_ms": self.timeouts.kernel_cache_ms,
                "readonly": self.options.read_only,
                "incarnation": self.held.record.incarnation if self.held is not None else 0,
                "restart": reattach.command(self),
                "restart_ms": self.timeouts.restart_ms,
            }
        )
        self.spawn(self._first_resume())

    async def _first_resume(self) -> None:
        assert self.fuse is not None
        await self.fuse.attached.wait()
        if self.serving:
            self._resume_fuse()

    def _resume_fuse(self) -> None:
        assert self.fuse is not None
        if not self.fuse.attached.is_set():
            return
        self._tell_lease()
        if self.home is not None:
            recorded = self.home.master.recorded()
            self.fuse.resume(self.epoch, self.home_slot, True, recorded, self.home.lower.mount_fd)
        else:
            direct = self.client.direct() if self.client is not None else None
            self.fuse.resume(self.epoch, self.home_slot, False, [], -1, direct)

    def _resume_all(self) -> None:
        """Tell every node, and our own FUSE layer, that this home serves."""
        for conn in self.peers.values():
            conn.send(FrameType.RESUME, pack_json({"epoch": self.epoch}), epoch=self.epoch)
        self._resume_fuse()

    # -- a change of home ------------------------------------------------------------------------------------------

    async def move_home(self, target: int) -> bool:
        """Give the home to node *target* (0: to nobody). False: it was called off, this node serves on.

        Raises MisuseError where this node is not the home or the target is not there.
        """
        async with self._moving:
            if self.home is None:
                raise MisuseError("this node is not the home any more")
            if target and (target not in self.peers or self.peers[target].closed):
                raise MisuseError(f"node {target} is not connected")
            try:
                return await self._move_home(self.home, target)
            except (MxfsError, OSError) as exc:
                self.fail(f"the home was lost while it was given away: {exc}")
                raise

    async def _move_home(self, role: HomeRole, target: int) -> bool:
        assert self.heartbeat is not None and self.fuse is not None
        log.info("moving the home", target=target)
        self.serving = False
        self._leaving_home = True
        for conn in self.peers.values():
            conn.send(FrameType.FREEZE, pack_json({"epoch": self.epoch}), epoch=self.epoch)
        self.fuse.freeze(self.epoch, 0)
        await role.freeze()
        held = await self._fuse_leaves_lower()
        if held.get("count"):
            # It has left nothing: the kernel serves these files, and cannot be told to serve them otherwise.
            self.held_by = f"{held['count']} files are open for passthrough: {await self._holders()}"
            log.error("the home stays: files are open for passthrough", inodes=held["held"], held_by=self.held_by)
            role.replace_lower(role.lower)
            self._serve_again()
            return False
        await asyncio.to_thread(role.lower.syncfs)
        role.lower.close()
        await self.heartbeat.disarm()
        if not await self._unmounted():
            self.held_by = f"a process still holds files of the lower mount: {await self._holders()}"
            log.error("the move was called off: a process still holds files of the lower mount", held_by=self.held_by)
            await self._serve_on(role)
            return False
        until = await self.heartbeat.set_home(None)
        lease = await asyncio.to_thread(self.lockspace.read_lease)
        await asyncio.to_thread(self.lockspace.give_lease, lease, until, target, self.timeouts)
        # Those that are silent just now too: they may hold something.
        members = self.members.present() if self.members is not None else []
        fields = {
            "slot": target,
            "epoch": self.epoch + 1,
            "members": sorted({*members, self.slot, target}),
            "evicted": sorted(self.evicted),
        }
        self.figures.home_ended(role.totals())
        self.home = None
        self._lower = None
        self.succession.gave_up()
        if self.members is not None:
            self.members.close()
            self.members = None
        for conn in list(self.peers.values()):
            conn.send(FrameType.MOVE, pack_json(fields), epoch=self.epoch)
            conn.close()
            self.direct.end(conn)
        self.peers.clear()
        self._named.clear()
        if self.stopping is None or not self.stopping.done():
            self.home_slot = target
            self.client = ClientRole(self)
            # A home that is cut off leaves the lease to others for longer than they need to find out.
            times = self.timeouts
            self.client.expect_home(times.grace_ms if target else 2 * times.node_dead_ms)
            self.spawn(self.client.follow())
        return True

    async def _holders(self) -> str:
        """Who has files of our mount open, or maps them."""
        found = await asyncio.to_thread(procs.holders, self.mountpoint)
        return procs.describe(found[:_NAMED]) or "by nobody that is seen from here"

    async def _fuse_leaves_lower(self) -> dict[str, Any]:
        """Have our own FUSE layer close everything below (nothing to do where it has ended). Returns what it says: the
        ``count`` of files for which it cannot, and then it has closed nothing."""
        assert self.fuse is not None
        if not self.fuse.attached.is_set() or self.fuse.gone.is_set():
            return {}
        self._lower_left = asyncio.get_running_loop().create_future()
        self.fuse.frame(FrameType.FREEZE, [pack_json({})])
        gone = asyncio.ensure_future(self.fuse.gone.wait())
        await asyncio.wait((self._lower_left, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        return self._lower_left.result() if self._lower_left.done() else {}

    async def _unmounted(self) -> bool:
        """The trial: whether the device can be opened exclusively, which no mounted one can. We keep it open so."""
        for _ in range(_TRIAL_TRIES):
            if self._hold_device():
                return True
            await asyncio.sleep(_TRIAL_WAIT_S)
        return False

    async def _serve_on(self, role: HomeRole) -> None:
        lower = await asyncio.to_thread(self._mount, exclusive=False)
        await self._arm(lower)
        role.replace_lower(lower)
        self._lower = lower
        self._serve_again()

    def _serve_again(self) -> None:
        self._leaving_home = False
        self.serving = True
        self._resume_all()

    async def take_home(self, fields: dict[str, Any]) -> None:
        """The home before gave its lease to this node."""
        assert self.held is not None and self.stopping is not None
        async with self._moving:
            if self.stopping.done():
                log.info("the home was offered to a node that leaves: another one takes it")
                return
            if self.client is not None:
                self.client.close()
                self.client = None
            self.evicted.update((int(slot), int(incarnation)) for slot, incarnation in fields["evicted"])
            members = {int(slot) for slot in fields["members"]} - {self.slot}
            if not await self.succession.attempt(wait_ms=self.timeouts.lease_ms, members=members):
                log.error("the home was offered, but the lease was not to be had")
                self.client = ClientRole(self)
                self.spawn(self.client.follow())

    def _cut_off(self) -> None:
        """Most others cannot be reached, though they live: it is this node that is cut off. Let one of them be home."""
        if self._stepping_down or self._moving.locked() or self.home is None:
            return
        log.error("most nodes cannot be reached although they live: giving the home up")
        self._stepping_down = True
        self.spawn(self._step_down())

    async def _step_down(self) -> None:
        try:
            if not await self.move_home(0):
                await asyncio.sleep(self.timeouts.node_dead_ms / 1000)  # files are held: not tried at each look
        except MisuseError as exc:
            log.info("not given up", reason=str(exc))
        finally:
            self._stepping_down = False

    def _hold_device(self) -> bool:
        """Open the device exclusively, so that nobody mounts it by hand here."""
        if self._exclusive_fd < 0:
            try:
                self._exclusive_fd = os.open(self.device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            except OSError:
                return False
        return True

    def _release_device(self) -> None:
        if self._exclusive_fd >= 0:
            os.close(self._exclusive_fd)
            self._exclusive_fd = -1

    # -- peers (this node is the home) -----------------------------------------------------------------------------

    def _check_peer(self, who: PeerIdentity) -> str | None:
        if who.volume != self.volume:
            return f"it belongs to volume {who.volume}"
        if (who.slot, who.incarnation) in self.evicted:
            return f"slot {who.slot}, incarnation {who.incarnation} was put out of the volume: mount again there"
        report = self.heartbeat.report if self.heartbeat is not None else None
        view = report.slots.get(who.slot) if report is not None else None
        if view is not None and view.incarnation > who.incarnation:
            return f"slot {who.slot} has another owner since: mount again there"
        if view is not None and view.incarnation == who.incarnation and view.state in ENDED:
            return f"slot {who.slot}, incarnation {who.incarnation} was put out of the volume: mount again there"
        return None

    def _on_peer(self, conn: PeerConnection) -> None:
        conn.start(self._on_peer_frame, self._on_peer_lost)

    def _on_peer_lost(self, conn: PeerConnection, error: MxfsError | None) -> None:
        slot = conn.identity.slot
        if self.direct.lost(conn):
            return
        self.direct.end(conn)
        if self._named.get(slot) is conn:
            del self._named[slot]
        if self.peers.get(slot) is conn:
            del self.peers[slot]
            log.info("peer lost", peer=slot, reason=str(error) if error else "closed")
        elif isinstance(error, PeerError):
            log.warning("peer refused", peer=slot, reason=str(error))

    def _on_peer_frame(self, conn: PeerConnection, frame: Frame) -> None:
        try:
            self._peer_frame(conn, frame)
        except PeerError as exc:
            log.error("peer broke the protocol", peer=conn.identity.slot, reason=str(exc))
            conn.abort()

    def _peer_frame(self, conn: PeerConnection, frame: Frame) -> None:
        slot = conn.identity.slot
        home = self.home
        if frame.type is FrameType.HELLO:
            self._hello(conn, unpack_json(frame.payload))
            return
        if frame.type is FrameType.DIRECT:
            self.direct.join(conn, unpack_json(frame.payload), self.peers.get(slot), self.epoch)
            return
        if (main := self.direct.belongs_to(conn)) is not None:
            check_operation(frame.type)
            conn = main
        if home is None or self.peers.get(slot) is not conn:
            return
        if frame.type in (FrameType.OP_REQ, FrameType.LOCK) and self._named.get(slot) is not conn:
            return  # from before the node knew of this connection: it says it again, or what it names says it better
        if frame.type is FrameType.OP_REQ:
            if self.serving:
                home.on_operation(slot, frame)
        elif frame.type is FrameType.LOCK:
            # In the grace period only what is reclaimed counts; while the home is left, answers to BASTs still do.
            if self.serving or self._moving.locked():
                home.on_lock(slot, unpack_lock(frame.payload))
        elif frame.type is FrameType.LEASE:
            self._lease(conn, unpack_lease(frame.payload))
        elif frame.type is FrameType.RECLAIM:
            home.reclaim(slot, frame)
        elif frame.type is FrameType.RECLAIM_LOCKS:
            home.reclaim_locks(slot, frame)
        elif frame.type is FrameType.RECLAIM_DONE:
            home.reclaimed(slot, frame.session)
            self._named[slot] = conn
            if self.serving:
                conn.send(FrameType.RESUME, pack_json({"epoch": self.epoch}), epoch=self.epoch)
            self.succession.reclaimed(slot)
        elif frame.type is FrameType.MOVE:
            self.spawn(self._asked_to_move(conn, int(unpack_json(frame.payload)["slot"])))
        elif frame.type is FrameType.EVICT:
            if self.members is not None:
                fields = unpack_json(frame.payload)
                self.members.evict(int(fields["slot"]), int(fields["incarnation"]))
        elif frame.type is FrameType.LEAVE:
            if self.members is not None:
                self.members.left(slot, conn.identity.incarnation)
        else:
            raise PeerError(f"unexpected {frame.type.name}")

    def _hello(self, conn: PeerConnection, fields: dict[str, Any]) -> None:
        slot = conn.identity.slot
        if self.home is None or self.members is None or not self._may_act_as_home():
            conn.refuse("this node is not the home", retry=True)
            return
        reason = greeting.objection(fields, self.name, self.options.timeouts, self.fencing.name)
        continues = greeting.continued(fields)
        if reason is None and (slot, continues) in self.evicted:
            reason = f"slot {slot}, incarnation {continues} was put out of the volume: mount again there"
        if reason is None:
            reason = self.members.connected(slot, conn.identity.incarnation, continues)
        if reason is not None:
            log.warning("peer refused", peer=slot, reason=reason or "its earlier incarnation is still being put out")
            conn.refuse(reason or "what was here before is still being put out", retry=not reason)
            return
        before = self.peers.pop(slot, None)
        if before is not None:
            before.abort()
            self.direct.end(before)
        self.peers[slot] = conn
        self.figures.joined(slot, str(fields.get("name")))
        self.home.greet(slot, conn.identity.incarnation, continues)
        conn.send(
            FrameType.WELCOME,
            greeting.welcome(self.epoch, self.slot, self.root, self.direct.token(conn)),
            epoch=self.epoch,
        )
        log.info("peer joined", peer=slot, name=fields.get("name"), incarnation=conn.identity.incarnation)

    def _lease(self, conn: PeerConnection, stamp_ms: int) -> None:
        """A node asks for its lease. A home that may have lost its own has none to give."""
        if self.members is None:
            return
        if not self.members.contact(conn.identity.slot, conn.identity.incarnation):
            conn.refuse(f"slot {conn.identity.slot} was put out of the volume: mount again there")
            return
        if not self._may_act_as_home():
            return
        ack = LeaseAck(self.timeouts.lease_ms, stamp_ms)
        conn.send(FrameType.LEASE_ACK, pack_lease_ack(ack), epoch=self.epoch)

    def _may_act_as_home(self) -> bool:
        return now_ms() < self._home_lease_until_ms()

    def _home_lease_until_ms(self) -> int:
        """Until when the lease on the disk is ours: by the last renewal, or by the claim before the first one."""
        report = self.heartbeat.report if self.heartbeat is not None else None
        return max((report.lease_until_ms or 0) if report is not None else 0, self._claimed_until_ms)

    async def _asked_to_move(self, conn: PeerConnection, target: int) -> None:
        try:
            moved = await self.move_home(target)
            reason = "" if moved else f"called off: {self.held_by}"
        except MxfsError as exc:
            reason = str(exc)
        if reason:
            log.warning("home not moved", reason=reason)

    def _node_out(self, slot: int, incarnation: int, how: str) -> None:
        """A node is out for good, and its lease is over: drop what it held."""
        if self.home is None:
            return
        log.info("node out", peer=slot, how=how)
        if how == "evicted":
            self.figures.put_out += 1
            self.evicted.add((slot, incarnation))
        conn = self.peers.get(slot)
        if conn is not None and conn.identity.incarnation == incarnation:
            del self.peers[slot]
            conn.close()
            self.direct.end(conn)
        self.home.node_gone(slot)
        self.succession.out(slot)

    def _on_silent(self, slot: int) -> None:
        log.warning("a node does not answer a blocking AST", peer=slot, connected=slot in self.peers)

    def _send_lock(self, slot: int, record: LockRecord) -> None:
        if slot == self.slot:
            assert self.fuse is not None
            self.fuse.record(record)
            return
        conn = self.peers.get(slot)
        if conn is not None:
            conn.send(FrameType.LOCK, pack_lock(record), epoch=self.epoch)

    def _send_reply(self, slot: int, kind: FrameType, parts: list[bytes], session: int, seq: int) -> None:
        if slot == self.slot:
            assert self.fuse is not None
            self.fuse.frame(kind, parts, self.epoch, session, seq)
            return
        conn = self.peers.get(slot)
        if conn is not None:
            self.direct.of(conn).send(kind, parts, epoch=self.epoch, session=session, seq=seq)

    # -- our own FUSE layer ----------------------------------------------------------------------------------------

    def _on_fuse_record(self, record: Record) -> None:
        if not isinstance(record, LockRecord):
            return
        if self.home is not None:
            self.home.on_lock(self.slot, record)
        elif self.client is not None:
            self.client.send_lock(record)

    def _on_fuse_frame(self, frame: Frame) -> None:
        if frame.type is FrameType.FREEZE:
            fields = unpack_json(frame.payload)
            if fields.get("down"):
                if not self.ending:
                    self.fail("the lower file system has shut down")
            elif "cut" in fields:
                if self.client is not None:
                    self.client.direct_lost(str(fields["cut"]))
            elif self._lower_left is not None and not self._lower_left.done():
                self._lower_left.set_result(fields)
        elif self.home is not None:
            if frame.type is FrameType.OP_REQ and self.serving:
                self.home.on_operation(self.slot, frame)
            elif frame.type is FrameType.RECLAIM:
                self.home.reclaim(self.slot, frame)
            elif frame.type is FrameType.RECLAIM_LOCKS:
                self.home.reclaim_locks(self.slot, frame)
            elif frame.type is FrameType.RECLAIM_DONE:
                self.home.claim_session(self.slot, frame.session)
                self.home.reclaimed_locks(self.slot)
                self.succession.reclaimed(self.slot)
        elif self.client is not None:
            self.client.forward(frame)

    def _on_fuse_gone(self, reason: str) -> None:
        assert self.fuse is not None
        if self.fuse.crashed and self.fuse.served:
            self.spawn(reattach.bury(self, reason))
        else:
            self.stop(reason)

    # -- time ------------------------------------------------------------------------------------------------------

    def _on_report(self, report: BeatReport) -> None:
        self._tell_lease()
        if self.members is not None:
            if self._disk_away:
                self.members.disk(False)
            self.members.report(report)
        self._disk_away = False

    def _tell_lease(self) -> None:
        """Tell the FUSE layer for how long what it caches may be used."""
        if self.fuse is None or not self.fuse.attached.is_set() or not self.serving:
            return
        until = self.client_lease_until_ms if self.home is None else self._home_lease_until_ms()
        left = max(0, until - now_ms())
        self.fuse.record(NodeStatus(self.slot, NodeState.ACTIVE, self.epoch, self.home_slot, left))
        if self.heartbeat is not None:
            self.heartbeat.tell_lease(until)

    def _on_heartbeat(self, event: HeartbeatEvent) -> None:
        if event.name == "died":
            log.error("the heartbeat process is gone", reason=event.reason)
            self.spawn(reattach.end_without_heartbeat(self, f"{event.name}: {event.reason}"))
        elif event.name in ("slot_lost", "lease_lost"):
            log.error("this node is out", event_name=event.name, reason=event.reason)
            self.crash_lower()
            self.fail(f"{event.name}: {event.reason}")
        elif event.name == "lower_down":
            log.error("the lower mount was shut down", reason=event.reason)
        elif event.name in ("io_error", "stalled"):
            log.warning("the lockspace does not answer", event_name=event.name, age_ms=event.age_ms)
            if event.age_ms >= self.timeouts.lease_ms and self.members is not None:
                self._disk_away = True
                self.members.disk(True)

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.manager.alive(now_ms())
            if self.fuse is not None and self.fuse.served:
                self.manager.status(in_words(self))
            if self.home is not None and not self._leaving_home and not self._may_act_as_home():
                # The heartbeat process has done this long ago, or is stopped itself.
                self._on_heartbeat(HeartbeatEvent("lease_lost", "nothing is heard of a renewal"))
                return
            if self.home is not None:
                self.home.tick()
                if self.members is not None:
                    self.members.tick()
                self.succession.tick()
                self._tell_lease()

    async def _guard(self) -> None:
        """See at each renewal whether the disk still lets this node in; stop at once where it was shut out."""
        while True:
            await asyncio.sleep(self.timeouts.renewal_ms / 1000)
            try:
                standing = await asyncio.to_thread(self.fencing.check)
                if standing is Standing.LOST:
                    await self._reestablish()
                elif standing is Standing.OK:
                    self._thaw()
            except Preempted:
                standing = Standing.PREEMPTED
            except MxfsError as exc:
                log.warning("the reservation could not be looked at", reason=str(exc))
                continue
            if standing is Standing.PREEMPTED:
                self.crash_lower()
                self.refused("another node has fenced this one: its registration on the disk is gone")
                return

    async def _is_fenced(self) -> bool:
        """Whether another node has had the disk refuse this one, which may not know it yet."""
        while True:
            try:
                return await asyncio.to_thread(self.fencing.check) is Standing.PREEMPTED
            except Preempted:
                return True
            except MxfsError:  # no answer: if it stays so, the lease ends
                await asyncio.sleep(self.timeouts.renewal_ms / 1000)

    async def _reestablish(self) -> None:
        """The target forgot registrations and reservation: freeze, let ourselves in again, and go on."""
        log.error("the disk has lost the reservation: frozen until it is there again")
        if self.serving and self.home is not None and self.fuse is not None:
            self._frozen = self.home
            self.serving = False
            for conn in self.peers.values():
                conn.send(FrameType.FREEZE, pack_json({"epoch": self.epoch}), epoch=self.epoch)
            self.fuse.freeze(self.epoch, 0)
        await asyncio.to_thread(self.fencing.reestablish, self._still_ours)
        log.warning("the reservation is there again")
        self._thaw()

    def _thaw(self) -> None:
        """The disk shuts out whom it should again: serve on, where this node is still the home that was frozen."""
        home, self._frozen = self._frozen, None
        if home is not None and home is self.home and not self._leaving_home:
            self.serving = True
            self._resume_all()

    def _still_ours(self) -> bool:
        """Whether the disk shows our slot as ours, and the lease too where this node is the home. Runs in a thread."""
        assert self.held is not None
        ours = (self.held.record.node_uuid, self.held.record.incarnation)
        lockspace = Lockspace.open(self.device)
        try:
            snap = lockspace.snapshot()
        finally:
            lockspace.close()
        mine = snap.slot(self.held.record.slot)
        if mine is None or (mine.node_uuid, mine.incarnation) != ours or mine.state in ENDED:
            return False
        lease = snap.lease
        return self.home is None or (lease is not None and (lease.owner_uuid, lease.incarnation) == ours)

    def crash_lower(self) -> bool:
        """Shut the lower XFS down without a log flush (XFS_IOC_GOINGDOWN), as a power failure would."""
        if self.home is None or self.home.lower.mount_fd < 0:
            return False
        fcntl.ioctl(self.home.lower.mount_fd, _XFS_IOC_GOINGDOWN, _NO_LOG_FLUSH)
        return True
