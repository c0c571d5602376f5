"""The daemon's side of the heartbeat process: starts it, sends commands, hands on reports and events."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mxfs_proto.errors import IoFailure, MisuseError
from mxfs_proto.ondisk import Address, LeaseState, SlotState
from mxfsd.core.lease import Evidence, HeldLease, HeldSlot
from mxfsd.core.timeouts import Timeouts
from mxfsd.heartbeat import MAX_DATAGRAM, arguments
from mxfsd.io.clock import now_ms

_KILL_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot in a report; *age_ms*: for how long the counter did not move, on this node's clock."""

    slot: int
    uuid: bytes
    name: str
    incarnation: int
    state: SlotState
    counter: int
    nonce: int
    age_ms: int
    is_home: bool
    epoch_seen: int
    pr_key: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class LeaseView:
    """The home lease in a report; *age_ms* as in SlotView."""

    epoch: int
    state: LeaseState
    owner_slot: int
    owner_uuid: bytes
    incarnation: int
    target_slot: int
    renewals: int
    sequence: int
    age_ms: int


@dataclass(frozen=True, slots=True)
class BeatReport:
    """What one beat saw. *lease_until_ms* (now_ms clock) is set while this node renews the home lease."""

    beat: int
    now_ms: int
    own_slot: int
    slots: dict[int, SlotView]
    lease: LeaseView | None
    lease_until_ms: int | None
    unreadable: dict[int, str]

    def evidence(self) -> Evidence | None:
        """Return what LeaseClaim needs to believe that the owner is dead without watching again."""
        owner = self.slots.get(self.lease.owner_slot) if self.lease is not None else None
        if self.lease is None or owner is None:
            return None
        return Evidence(owner.slot, owner.incarnation, owner.counter, self.lease.sequence)

    @classmethod
    def parse(cls, message: dict[str, Any]) -> "BeatReport":
        """Return the report in a datagram."""
        views = [
            SlotView(
                **item
                | {
                    "uuid": bytes.fromhex(item["uuid"]),
                    "state": SlotState[item["state"]],
                    "addresses": tuple(Address(host, port) for host, port in item["addresses"]),
                }
            )
            for item in message["slots"]
        ]
        lease = message["lease"]
        return cls(
            message["beat"],
            message["now_ms"],
            message["slot"],
            {view.slot: view for view in views},
            None
            if lease is None
            else LeaseView(
                **lease | {"state": LeaseState[lease["state"]], "owner_uuid": bytes.fromhex(lease["owner_uuid"])}
            ),
            message["lease_until_ms"],
            {int(number): reason for number, reason in message["unreadable"].items()},
        )


@dataclass(frozen=True, slots=True)
class HeartbeatEvent:
    """Something that is no report.

    *name*: started, lower_down (the process has shut the lower mount down), slot_lost (this node is out: stop),
    lease_lost (stop acting as home now), io_error (*age_ms* since the last good beat), stalled (nothing was written for
    too long; caches and locks are void), resumed, died (the process ended unasked: treat it like slot_lost).
    """

    name: str
    reason: str = ""
    age_ms: int = 0


class HeartbeatClient:
    """One heartbeat process. Callbacks run in the event loop that called ``start``."""

    def __init__(
        self,
        device: str,
        held: HeldSlot,
        timeouts: Timeouts,
        on_report: Callable[[BeatReport], None],
        on_event: Callable[[HeartbeatEvent], None],
        *,
        watchdog: str = "",
        run_dir: str = "",
    ) -> None:
        self.watchdog = watchdog
        self.run_dir = run_dir
        self.armed = False
        """The process guards a lower mount of ours."""
        self.device = device
        self.held = held
        self.timeouts = timeouts
        self.report: BeatReport | None = None
        self.last_report_ms = 0
        self._on_report = on_report
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._acks: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._leaving = False
        self._ended: asyncio.Event = asyncio.Event()

    @property
    def pid(self) -> int:
        """Process id. Raises MisuseError before ``start``."""
        if self._process is None:
            raise MisuseError("the heartbeat process was not started")
        return self._process.pid

    @property
    def silent_ms(self) -> int:
        """Milliseconds since the last report came; the daemon freezes when this passes its lease."""
        return now_ms() - self.last_report_ms

    async def start(self) -> None:
        """Start the process; returns after its first beat. Raises IoFailure."""
        if self._process is not None:
            raise MisuseError("the heartbeat process was started already")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        words = arguments(
            theirs.fileno(), self.device, self.held, self.timeouts, os.getpid(), self.watchdog, self.run_dir
        )
        command = [sys.executable, *words]
        try:
            with theirs:
                # A session of its own: an interrupt typed at a terminal must not stop the beats.
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
        except OSError as error:
            ours.close()
            raise IoFailure(f"cannot start the heartbeat process: {error.strerror}", error.errno) from error
        self._sock = ours
        self._pidfd = os.pidfd_open(self._process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(ours, self._readable)
        loop.add_reader(self._pidfd, self._exited)
        self.last_report_ms = now_ms()
        # Importing Python modules takes seconds on a machine with a slow root file system.
        await self._command("beat", limit_ms=self.timeouts.ready_ms)

    async def beat(self) -> None:
        """Beat now, out of turn; afterwards ``report`` is fresh. Raises IoFailure."""
        await self._command("beat")

    async def set_state(self, state: SlotState) -> None:
        """Show *state* in the slot; it is on the disk when this returns. Raises IoFailure."""
        await self._command("state", state=state.name)

    async def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """Show *addresses* in the slot. Raises IoFailure."""
        await self._command("addresses", addresses=[[a.host, a.port] for a in addresses])

    async def set_home(self, held: HeldLease | None) -> int:
        """Begin to renew a lease just claimed, or (None) stop renewing.

        When it returns from None, the process does not touch the lease any more, and the daemon may write it until the
        time (now_ms clock) that is returned; 0 if it was lost before. Raises IoFailure if the lease is not ours.
        """
        if held is None:
            return int((await self._command("no_home"))["until_ms"])
        await self._command("home", epoch=held.record.epoch, since_ms=held.since_ms)
        return held.since_ms + self.timeouts.lease_ms

    async def arm(self, lower_fd: int) -> None:
        """Have the process shut the lower mount at *lower_fd* down when this node must not be home any more.

        To be called right after mounting, before anybody is served. Raises IoFailure: the lease is over (then the mount
        was shut down), or the watchdog cannot be used.
        """
        self.armed = True
        await self._command("arm", fds=[lower_fd])

    async def disarm(self) -> None:
        """Have the process close its descriptor of the lower mount, which is left in good order. Raises IoFailure."""
        await self._command("disarm")
        self.armed = False

    async def watch_fuse(self, pid: int, fds: list[int]) -> None:
        """Have the process end the caches of the mount that FUSE process *pid* serves, when that cannot do it itself.

        *fds* (``mxfsd.caches.DESCRIPTORS``) are closed here: nobody else may keep them. Raises IoFailure.
        """
        try:
            await self._command("watch_fuse", fds=fds, pid=pid)
        finally:
            for fd in fds:
                os.close(fd)

    def tell_lease(self, until_ms: int) -> None:
        """What the kernel caches here may be used until then (now_ms clock)."""
        if self._sock is not None:
            with contextlib.suppress(OSError):  # full, or gone: the last one told counts, which is earlier
                self._sock.send(json.dumps({"cmd": "lease", "until_ms": until_ms}).encode())

    async def caches_ended(self) -> None:
        """Return when nothing that the kernel caches can be read any more; the FUSE layer is dead, or frozen.

        Raises IoFailure: it still may be.
        """
        await self._command("caches")

    async def leave(self) -> None:
        """Write LEFT into the slot and end the process. Raises IoFailure if that was not to be written.

        Raises MisuseError while a lower mount is guarded: then only the end of this process tells the other one to shut
        it down.
        """
        if self.armed:
            raise MisuseError("the lower mount is guarded still")
        self._leaving = True
        try:
            await self._command("leave")
            await asyncio.wait_for(self._ended.wait(), self.timeouts.io_timeout_ms / 1000)
        except TimeoutError as error:
            raise IoFailure("the heartbeat process does not end") from error
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process at once (SIGKILL), leaving the slot as it is. More than once is allowed."""
        self._leaving = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            try:
                self._process.wait(_KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                # Its I/O hangs in the kernel; it dies when that ends.
                pass
        self._close("was ended")

    async def _command(
        self, name: str, *, limit_ms: int = 0, fds: Sequence[int] = (), **arguments: object
    ) -> dict[str, Any]:
        """Send a command and return the answer; one beat may be in the way, so node_dead_ms is the limit."""
        if self._sock is None:
            raise IoFailure("the heartbeat process is not running")
        self._next_id += 1
        number = self._next_id
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._acks[number] = future
        try:
            data = json.dumps({"cmd": name, "id": number, **arguments}).encode()
            socket.send_fds(self._sock, [data], fds)
            answer = await asyncio.wait_for(future, (limit_ms or self.timeouts.node_dead_ms) / 1000)
        except TimeoutError as error:
            raise IoFailure(f"the heartbeat process did not answer {name!r}: does the disk hang?") from error
        except OSError as error:
            raise IoFailure(f"the heartbeat process is gone: {error.strerror}", error.errno) from error
        finally:
            self._acks.pop(number, None)
        if "error" in answer:
            raise IoFailure(f"heartbeat {name}: {answer['error']}")
        return answer

    def _readable(self) -> None:
        while self._sock is not None:
            try:
                data = self._sock.recv(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                # The end of the process itself is what counts; see _exited.
                asyncio.get_running_loop().remove_reader(self._sock)
                return
            self._dispatch(json.loads(data))

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "ack" in message:
            future = self._acks.get(message["ack"])
            if future is not None and not future.done():
                future.set_result(message)
        elif "beat" in message:
            self.report = BeatReport.parse(message)
            self.last_report_ms = now_ms()
            self._on_report(self.report)
        else:
            detail = HeartbeatEvent(message["event"], message.get("reason", ""), message.get("age_ms", 0))
            self._on_event(detail)

    def _exited(self) -> None:
        """The process ended: first what it still had to say, then the news."""
        self._readable()
        code = self._process.wait() if self._process is not None else 0
        unasked = not self._leaving
        self._close(f"ended with code {code}")
        if unasked:
            self._on_event(HeartbeatEvent("died", f"the heartbeat process ended with code {code}"))

    def _close(self, reason: str) -> None:
        if self._sock is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.remove_reader(self._pidfd)
        self._sock.close()
        self._sock = None
        os.close(self._pidfd)
        for future in self._acks.values():
            if not future.done():
                future.set_exception(IoFailure(f"the heartbeat process {reason}"))
        self._ended.set()
