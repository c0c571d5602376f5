"""What a node does while another one is the home: one TLS connection to it, kept up, and followed when it moves."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import structlog

from mxfs_proto.errors import IoFailure, MxfsError, PeerError, Refusal
from mxfs_proto.frames import (
    Frame,
    FrameType,
    pack_json,
    pack_lease,
    pack_lock,
    unpack_json,
    unpack_lease_ack,
    unpack_lock,
)
from mxfs_proto.ondisk import Address, LeaseRecord, LeaseState
from mxfs_proto.records import LockRecord
from mxfsd import greeting
from mxfsd import log as logging
from mxfsd.io.clock import now_ms
from mxfsd.io.identity import PeerIdentity
from mxfsd.io.peers import PeerConnection, connect_peer

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

log = structlog.get_logger(__name__)

_RETRY_S = 0.05
_FORWARDED = frozenset({FrameType.OP_REQ, FrameType.RECLAIM, FrameType.RECLAIM_LOCKS, FrameType.RECLAIM_DONE})
_LEASES_ASKED = 64
"""Stamps of lease requests that are remembered; an answer to an older one would give a lease that has ended."""


class ClientRole:
    """The connection to the home. Lives until the home moves here, or this node leaves."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self._conn: PeerConnection | None = None
        self._welcomed: asyncio.Future[greeting.Welcome] | None = None
        self._address: Address | None = None
        self._token = 0
        self._closed = False
        self._following = False
        self._expected_until_ms = 0
        self._misfit: LeaseRecord | None = None  # as the first of our attempts met somebody who does not fit
        self._asked_ms: deque[int] = deque(maxlen=_LEASES_ASKED)  # on this connection
        self._heard_ms = 0
        """When the home gave a lease last, or the connection to it was begun."""
        self._renewal: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """End the connection for good."""
        self._closed = True
        if self._conn is not None:
            self._conn.send(FrameType.LEAVE, pack_json({}), epoch=self._daemon.epoch)
            self._conn.close()
            self._conn = None

    # -- connecting ------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Join the home that the lease names. Raises IoFailure (not reached), Refusal (no use to try again)."""
        daemon = self._daemon
        assert daemon.contexts is not None and daemon.held is not None and daemon.fuse is not None
        lease = await asyncio.to_thread(daemon.lockspace.read_lease)
        if lease.state is not LeaseState.HELD or lease.owner_slot == daemon.slot:
            raise IoFailure("nobody is home")
        slot = (await asyncio.to_thread(daemon.lockspace.read_slots))[lease.owner_slot - 1]
        addresses = daemon.finder.addresses(lease.owner_slot, lease.incarnation) if daemon.finder is not None else []
        addresses += [a for a in (slot.addresses if slot is not None else ()) if a not in addresses]
        if not addresses:
            raise IoFailure(f"the home in slot {lease.owner_slot} has published no address yet")

        def check(who: PeerIdentity) -> str | None:
            if who.slot != lease.owner_slot or who.incarnation != lease.incarnation:
                raise IoFailure(f"slot {who.slot}, incarnation {who.incarnation} answers, not the home")
            return None

        timeout_s = daemon.timeouts.lease_ms / 2000
        failures: list[MxfsError] = []
        for address in addresses:
            try:
                conn = await connect_peer(
                    address.host,
                    address.port,
                    daemon.contexts.client,
                    self._on_frame,
                    self._on_lost,
                    check=check,
                    timeout_s=timeout_s,
                )
                self._address = address
                await self._greet(conn)
            except Refusal:
                raise
            except MxfsError as exc:
                failures.append(exc)
            else:
                self._misfit = None
                return
        raise self._judge(lease, failures)

    def _judge(self, lease: LeaseRecord, failures: list[MxfsError]) -> MxfsError:
        """Return what it means that none of the home's addresses served us.

        Whoever answers there and has another key, say, may have come by the address of a home that is dead. But when
        the lease was renewed between two such answers, then the home lives, and it is the home that does not fit.
        """
        if not all(isinstance(failure, PeerError) for failure in failures):
            self._misfit = None
            return next(failure for failure in failures if not isinstance(failure, PeerError))
        before = self._misfit
        if before is None or (before.epoch, before.owner_slot) != (lease.epoch, lease.owner_slot):
            before = self._misfit = lease
        reason = str(failures[0])
        return Refusal(reason) if lease.sequence != before.sequence else IoFailure(reason)

    async def _greet(self, conn: PeerConnection) -> None:
        daemon = self._daemon
        self._welcomed = asyncio.get_running_loop().create_future()
        self._conn = conn
        self._asked_ms.clear()
        self._heard_ms = now_ms()
        assert daemon.fuse is not None
        continues = daemon.fuse.continues
        settings = (daemon.options.timeouts, daemon.fencing.name)
        conn.send(FrameType.HELLO, greeting.hello(daemon.name, daemon.slot, *settings, continues))
        self._renew()
        try:
            welcome = await asyncio.wait_for(self._welcomed, daemon.timeouts.lease_ms / 1000)
            if self._conn is not conn:
                raise IoFailure(f"{conn.peer_name} closed the connection after its welcome")
        except TimeoutError:
            conn.abort()
            self._conn = None
            raise IoFailure(f"{conn.peer_name} did not answer our greeting") from None
        except MxfsError:
            conn.close()
            self._conn = None
            raise
        finally:
            self._welcomed = None
        self._token = welcome.token
        daemon.epoch = welcome.epoch
        daemon.home_slot = welcome.home
        daemon.root = welcome.root
        daemon.serving = False
        logging.context.epoch = daemon.epoch
        if daemon.fuse.attached.is_set():
            daemon.fuse.freeze(daemon.epoch, daemon.home_slot)
        else:
            daemon._welcome_fuse()
            if not daemon.fuse.continues:
                conn.send(FrameType.RECLAIM_DONE, pack_json({"rows": 0}), epoch=daemon.epoch)

    def direct(self) -> dict[str, Any] | None:
        """Return what our FUSE layer needs to send operations to the home by itself, None without a connection."""
        conn, contexts, address = self._conn, self._daemon.contexts, self._address
        if conn is None or contexts is None or address is None:
            return None
        return {
            "host": address.host,
            "port": address.port,
            "slot": conn.identity.slot,
            "incarnation": conn.identity.incarnation,
            "token": self._token,
            "pem": contexts.pem.decode("ascii"),
            "authority": contexts.authority.hex(),
        }

    def direct_lost(self, reason: str) -> None:
        """The FUSE layer has lost its own connection to the home: what was under way over it is asked for again, as
        after the loss of ours."""
        if self._conn is not None and self._welcomed is None:
            conn = self._conn
            conn.abort()
            self._on_lost(conn, IoFailure(f"the connection for operations was lost: {reason}"))

    def expect_home(self, ms: int) -> None:
        """Another node is to take the lease: leave it the time for that."""
        self._expected_until_ms = now_ms() + ms

    async def follow(self) -> None:
        """Connect, again and again, until there is a home; take the lease where the home is dead or gave it up."""
        if self._following:
            return
        self._following = True
        try:
            await self._follow()
        finally:
            self._following = False

    async def _follow(self) -> None:
        daemon = self._daemon
        while not self._closed:
            try:
                await self.connect()
                daemon.succession.heard()
                daemon._hold_device()
                return
            except Refusal as exc:
                log.error("the home refuses this node", reason=str(exc))
                daemon.refused(str(exc))
                return
            except MxfsError as exc:
                log.debug("home not reached", reason=str(exc))
            if await self._succeed():
                return
            await daemon.pause(_RETRY_S)

    async def _succeed(self) -> bool:
        """Become the home where the lease is free, or its owner is dead. True: this role is over."""
        daemon = self._daemon
        if now_ms() < self._expected_until_ms or not await daemon.succession.attempt():
            return False
        self._closed = True
        daemon.client = None
        return True

    # -- frames from the home --------------------------------------------------------------------------------------

    def _on_frame(self, conn: PeerConnection, frame: Frame) -> None:
        daemon = self._daemon
        assert daemon.fuse is not None
        if conn is not self._conn:
            return
        if frame.type is FrameType.OP_REPLY:
            daemon.fuse.frame(FrameType.OP_REPLY, [bytes(frame.payload)], frame.epoch, frame.session, frame.seq)
        elif frame.type is FrameType.LOCK:
            if frame.epoch == daemon.epoch:
                daemon.fuse.record(unpack_lock(frame.payload))
        elif frame.type is FrameType.LEASE_ACK:
            self._leased(*unpack_lease_ack(frame.payload))
        elif frame.type is FrameType.WELCOME:
            if self._welcomed is not None and not self._welcomed.done():
                self._welcomed.set_result(greeting.read_welcome(unpack_json(frame.payload)))
        elif frame.type is FrameType.REFUSE:
            self._failed(greeting.read_refusal(unpack_json(frame.payload), conn.peer_name))
        elif frame.type is FrameType.FREEZE:
            daemon.serving = False
            daemon.fuse.freeze(daemon.epoch, 0)
        elif frame.type is FrameType.RESUME:
            daemon.serving = True
            daemon._resume_fuse()
        elif frame.type is FrameType.MOVE:
            self._moved(unpack_json(frame.payload))

    def _failed(self, error: MxfsError) -> None:
        """The greeting in progress has come to nothing."""
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_exception(error)

    def _moved(self, fields: dict[str, Any]) -> None:
        daemon = self._daemon
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        daemon.serving = False
        if int(fields["slot"]) == daemon.slot:
            daemon.spawn(daemon.take_home(fields))
            return
        self.expect_home(daemon.timeouts.grace_ms)
        daemon.spawn(self.follow())

    def home_announced(self, slot: int, epoch: int) -> None:
        """A home of *epoch* has announced itself. A later one than ours: ours is none any more, and may hang."""
        if self._conn is not None and self._welcomed is None and epoch > self._daemon.epoch:
            conn = self._conn
            conn.abort()
            self._on_lost(conn, IoFailure(f"slot {slot} is home since, of epoch {epoch}"))

    def _on_lost(self, conn: PeerConnection, error: MxfsError | None) -> None:
        if conn is not self._conn:
            return
        self._conn = None
        daemon = self._daemon
        reason = str(error) if error is not None else "closed"
        if self._welcomed is not None:  # `_greet` deals with it
            closed = IoFailure(f"the home closed the connection: {reason}")
            self._failed(error if isinstance(error, PeerError) else closed)
            return
        if self._closed:
            return
        log.warning("home lost", reason=reason)
        daemon.serving = False
        if daemon.fuse is not None:
            daemon.fuse.freeze(daemon.epoch, 0)
        daemon.spawn(self.follow())

    # -- frames to the home ----------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Ask for another lease: it counts from now, whenever the answer comes."""
        if self._renewal is not None:
            self._renewal.cancel()
        if self._conn is None or self._conn.closed or self._closed:
            return
        stamp_ms = now_ms()
        if self._welcomed is None and stamp_ms - self._heard_ms > self._daemon.timeouts.lease_ms:
            # A connection that was cut says nothing by itself. Perhaps there is another home since, or could be.
            conn = self._conn
            conn.abort()
            self._on_lost(conn, IoFailure(f"the home has been silent for {stamp_ms - self._heard_ms} ms"))
            return
        self._asked_ms.append(stamp_ms)
        self._conn.send(FrameType.LEASE, pack_lease(stamp_ms), epoch=self._daemon.epoch)
        delay_s = self._daemon.timeouts.renewal_ms / 2000
        self._renewal = asyncio.get_running_loop().call_later(delay_s, self._renew)

    def _leased(self, lease_ms: int, stamp_ms: int) -> None:
        """The home has given the lease that we asked for at *stamp_ms*."""
        daemon = self._daemon
        if stamp_ms not in self._asked_ms or lease_ms > daemon.timeouts.lease_ms:
            log.warning("a lease that we did not ask for", lease_ms=lease_ms, stamp_ms=stamp_ms)
            return
        self._heard_ms = max(self._heard_ms, now_ms())
        daemon.client_lease_until_ms = max(daemon.client_lease_until_ms, stamp_ms + lease_ms)
        daemon._tell_lease()

    def send_lock(self, record: LockRecord) -> None:
        """Pass a lock message of our FUSE layer on; without a home it is dropped (reclaims make up for it)."""
        if self._conn is not None:
            self._conn.send(FrameType.LOCK, pack_lock(record), epoch=self._daemon.epoch)

    def forward(self, frame: Frame) -> None:
        """Pass an operation or a reclaim of our FUSE layer on; without a home it is dropped and sent again later."""
        if self._conn is None:
            return
        if frame.type in _FORWARDED:
            self._conn.send(frame.type, frame.payload, epoch=frame.epoch, session=frame.session, seq=frame.seq)

    def ask_move(self, target: int) -> None:
        """Ask the home to move to node *target*. Raises IoFailure without a connection."""
        if self._conn is None:
            raise IoFailure("the home is not reachable just now")
        self._conn.send(FrameType.MOVE, pack_json({"slot": target}), epoch=self._daemon.epoch)

    def ask_evict(self, slot: int, incarnation: int) -> None:
        """Ask the home to put a node out. Raises IoFailure without a connection."""
        if self._conn is None:
            raise IoFailure("the home is not reachable just now")
        fields = {"slot": slot, "incarnation": incarnation}
        self._conn.send(FrameType.EVICT, pack_json(fields), epoch=self._daemon.epoch)
