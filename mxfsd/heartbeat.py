"""The heartbeat process: writes this node's slot, reads the others', renews the home lease.

``python -m mxfsd.heartbeat --fd N --device D --slot S --incarnation I --nonce X --since MS --parent PID
--timeouts JSON`` (see ``arguments``)

It is a process of its own, because an event loop that has other things to do is no source of liveness. Two threads:
one does the disk I/O (which may hang), the other one talks to the daemon and watches the time. It talks JSON
datagrams over the SOCK_SEQPACKET socket *fd*: reports, events and acknowledgements out, commands in.
Imports are few on purpose: it must start fast and stay small.
"""

import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from typing import Any

from mxfs_proto.errors import IoFailure, MediaError, MxfsError
from mxfs_proto.ondisk import Address, LeaseState, SlotRecord, SlotState
from mxfsd.core.keeper import Duty, Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import HeldLease, HeldSlot, same_lease
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch
from mxfsd.io.clock import now_ms
from mxfsd.io.lockspace import ClaimRefused, Lockspace

EXIT_SLOT_LOST = 3
EXIT_PARENT_DIED = 4
MAX_DATAGRAM = 1 << 17
_MCL_CURRENT, _MCL_FUTURE = 1, 2

Message = dict[str, Any]


def slot_json(slot: SlotRecord, age_ms: int) -> Message:
    """Return one slot as it appears in a report."""
    return {
        "slot": slot.slot,
        "uuid": slot.node_uuid.hex(),
        "name": slot.name,
        "incarnation": slot.incarnation,
        "state": slot.state.name,
        "counter": slot.counter,
        "nonce": slot.nonce,
        "age_ms": age_ms,
        "is_home": slot.is_home,
        "epoch_seen": slot.epoch_seen,
        "pr_key": slot.pr_key,
        "addresses": [[address.host, address.port] for address in slot.addresses],
    }


class Beater:
    """The disk thread: one beat or command after the other."""

    def __init__(self, lockspace: Lockspace, keeper: Keeper, timeouts: Timeouts, post: "Outbox") -> None:
        self.lockspace = lockspace
        self.keeper = keeper
        self.timeouts = timeouts
        self.post = post
        self.commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.watch = Watch(timeouts.lease_ms)
        self.beats = 0
        self.io_since_ms: int | None = None
        self.ok_ms = now_ms()
        self.exit_code: int | None = None

    def run(self) -> None:
        """Beat until told to leave or until the slot is lost."""
        due = now_ms()
        while self.exit_code is None:
            command: Message | None = None
            left = due - now_ms()
            if left > 0:
                try:
                    command = self.commands.get(timeout=left / 1000)
                except queue.Empty:
                    continue
            try:
                self.io_since_ms = now_ms()
                if command is not None:
                    self.obey(command)
                else:
                    self.beat()
            except IoFailure as error:
                self.post.event("io_error", age_ms=now_ms() - self.ok_ms, reason=str(error))
            except MxfsError as error:
                self.lose(f"cannot go on: {error}")
            finally:
                self.io_since_ms = None
            if command is None:
                # Beats that were missed are not made up for.
                due = max(due + self.timeouts.heartbeat_ms, now_ms() - self.timeouts.heartbeat_ms)
        self.post.wake()

    def beat(self) -> None:
        """Read everything, write what is due, report."""
        snap = self.lockspace.snapshot()
        self.watch.observe(snap)
        duties: deque[Duty] = deque(self.keeper.on_read(snap))
        while duties:
            duty = duties.popleft()
            if isinstance(duty, SlotLost):
                self.lose(duty.reason)
                return
            if isinstance(duty, LeaseLost):
                self.post.event("lease_lost", reason=duty.reason)
            elif isinstance(duty, Stalled):
                self.recover(duty)
                return
            else:
                record = duty.record
                if isinstance(record, SlotRecord):
                    self.lockspace.write_slot(record)
                else:
                    self.lockspace.write_lease(record)
                result = self.keeper.on_written(duty, snap.began_ms, now_ms())
                if result is not None:
                    duties.append(result)
        self.ok_ms = now_ms()
        self.beats += 1
        self.post.report(self.report(snap))

    def recover(self, stalled: Stalled) -> None:
        """Claim the slot again after a stall; others may have counted this node dead meanwhile."""
        self.post.event("stalled", age_ms=stalled.ms)
        try:
            held = self.lockspace.reclaim_slot(self.keeper.record, self.timeouts, late=stalled.late)
        except ClaimRefused as error:
            self.lose(str(error))
            return
        self.keeper.resume(held)
        self.post.event("resumed", nonce=held.record.nonce)

    def lose(self, reason: str) -> None:
        """The slot is not ours: tell the daemon and end."""
        self.keeper.let_go()
        self.post.event("slot_lost", reason=reason)
        self.exit_code = EXIT_SLOT_LOST

    def obey(self, command: Message) -> None:
        """Execute one command; answer it with ``ack`` and, if it failed, ``error``."""
        name, answer = command.get("cmd"), {"ack": command.get("id")}
        try:
            if name == "home":
                answer |= self.home(command)
            elif name == "no_home":
                until = self.keeper.lease_until_ms
                lease = self.keeper.let_go()
                answer |= {"until_ms": until or 0, "held": lease is not None}
            elif name == "state":
                self.keeper.set_state(SlotState[command["state"]])
                self.beat()
            elif name == "addresses":
                self.keeper.set_addresses(tuple(Address(host, port) for host, port in command["addresses"]))
                self.beat()
            elif name in ("leave", "gasp"):
                self.end(SlotState.LEFT if name == "leave" else SlotState.FAILED)
                self.exit_code = 0 if name == "leave" else EXIT_PARENT_DIED
            elif name == "beat":
                self.beat()
            else:
                answer["error"] = f"unknown command {name!r}"
        except (KeyError, TypeError, ValueError, MxfsError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        if name != "gasp":
            self.post.put(answer)

    def home(self, command: Message) -> Message:
        """Begin to renew a lease that the daemon has just claimed; the first renewal is written at once."""
        lease = self.lockspace.read_lease()
        mine = (self.keeper.record.node_uuid, self.keeper.record.incarnation)
        if (
            lease.epoch != command["epoch"]
            or (lease.owner_uuid, lease.incarnation) != mine
            or lease.state is not LeaseState.HELD
        ):
            return {"error": f"the lease is not ours: epoch {lease.epoch}, slot {lease.owner_slot}"}
        lost = self.keeper.hold(HeldLease(lease, command["since_ms"]), now_ms())
        if lost is not None:
            return {"error": lost.reason}
        self.beat()
        held = self.keeper.lease
        return {} if held is not None and same_lease(held, lease) else {"error": "the lease was lost at once"}

    def end(self, state: SlotState) -> None:
        """Write the last record of this claim, if the slot is ours still. Durable: it must survive a reboot."""
        self.keeper.let_go()
        snap = self.lockspace.snapshot()
        found = snap.slot(self.keeper.record.slot)
        if found is not None and not found.same_claim(self.keeper.record):
            return
        if snap.ended_ms <= self.keeper.slot_until_ms:
            self.lockspace.write_slot(self.keeper.last(state))
            self.lockspace.disk.sync()

    def report(self, snap: Snapshot) -> Message:
        """Return the report of one beat. Slots that nobody has are left out."""
        own = self.keeper.record
        slots = [
            slot_json(slot, self.watch.age_ms(slot.slot))
            for slot in snap.slots
            if slot is not None and slot.state is not SlotState.FREE and slot.slot != own.slot
        ]
        # Ours as it was written after the read.
        slots.append(slot_json(own, 0))
        lease = snap.lease
        return {
            "beat": self.beats,
            "now_ms": snap.ended_ms,
            "slot": self.keeper.record.slot,
            "slots": slots,
            "unreadable": {str(number): str(error) for number, error in self.lockspace.bad.items()},
            "lease_until_ms": self.keeper.lease_until_ms,
            "lease": None
            if lease is None
            else {
                "epoch": lease.epoch,
                "state": lease.state.name,
                "owner_slot": lease.owner_slot,
                "owner_uuid": lease.owner_uuid.hex(),
                "incarnation": lease.incarnation,
                "target_slot": lease.target_slot,
                "renewals": lease.renewals,
                "sequence": lease.sequence,
                "age_ms": self.watch.age_ms(0),
            },
        }


class Outbox:
    """Datagrams to the daemon, from both threads. Reports may be dropped, anything else is kept and in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def wake_fd(self) -> int:
        """Readable when the other thread wants attention."""
        return self._wake_r

    def wake(self) -> None:
        """Interrupt the poll of the main thread."""
        try:
            os.write(self._wake_w, b"x")
        except BlockingIOError:
            # A full pipe wakes just as well.
            return

    def drain(self) -> None:
        """Forget wake-ups, send what waits."""
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            return
        finally:
            self.flush()

    def event(self, event: str, **detail: object) -> None:
        """Send an event."""
        self.put({"event": event, **detail})

    def put(self, message: Message) -> None:
        """Send *message*, later if the daemon is slow."""
        with self._lock:
            self._queue.append(json.dumps(message).encode())
        self.flush()

    def report(self, message: Message) -> None:
        """Send a report unless older messages wait: the next report says the same, newer."""
        with self._lock:
            if not self._queue:
                self._queue.append(json.dumps(message).encode())
        self.flush()

    def flush(self) -> bool:
        """Send what waits; return whether something is left."""
        with self._lock:
            while self._queue:
                try:
                    self.sock.send(self._queue[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    return True
                except OSError:
                    # The daemon is gone; the main thread sees that by itself.
                    self._queue.clear()
                    return False
                self._queue.popleft()
        return False


def serve(beater: Beater, outbox: Outbox, parent: int) -> int:
    """Run until the beater ends or the daemon dies; return the exit code."""
    thread = threading.Thread(target=beater.run, name="disk", daemon=True)
    thread.start()
    poll = select.poll()
    for fd in (outbox.sock.fileno(), outbox.wake_fd, parent):
        poll.register(fd, select.POLLIN)
    period = beater.timeouts.heartbeat_ms
    warned = 0
    while beater.exit_code is None:
        waiting = outbox.flush()
        ready = dict(poll.poll(20 if waiting else period // 2))
        outbox.drain()
        gone = parent in ready
        if not gone and outbox.sock.fileno() in ready:
            gone = not receive(beater, outbox.sock)
        if gone:
            return gasp(beater, thread)
        since = beater.io_since_ms
        now = now_ms()
        lost = beater.keeper.expire(now) if since is not None and now - since > period else None
        if lost is not None:
            outbox.event("lease_lost", reason=lost.reason)
        if since is not None and now - since > 2 * period and now - warned > period:
            warned = now
            outbox.event("io_error", age_ms=now - beater.ok_ms, reason=f"an I/O hangs since {now - since} ms")
    # Events and the last acknowledgement must arrive.
    deadline = now_ms() + beater.timeouts.io_timeout_ms
    while outbox.flush() and now_ms() < deadline:
        time.sleep(0.005)
    return beater.exit_code


def receive(beater: Beater, sock: socket.socket) -> bool:
    """Pass one command on; return False when the daemon has closed its end."""
    try:
        data = sock.recv(MAX_DATAGRAM, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if not data:
        return False
    try:
        command = json.loads(data)
    except ValueError:
        return True
    if isinstance(command, dict):
        beater.commands.put(command)
    return True


def gasp(beater: Beater, thread: threading.Thread) -> int:
    """The daemon died: say so in the slot, so that others need not wait for our counter to stand still."""
    beater.commands.put({"cmd": "gasp"})
    thread.join(beater.timeouts.io_timeout_ms / 1000)
    return EXIT_PARENT_DIED


def make_urgent() -> list[str]:
    """Lock the memory, ask for real-time priority, hide from the OOM killer; return what was not allowed."""
    refused = []
    import ctypes

    if ctypes.CDLL(None, use_errno=True).mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        refused.append("mlockall")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        refused.append("SCHED_FIFO")
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
    except OSError:
        refused.append("oom_score_adj")
    return refused


def main(args: list[str]) -> int:
    """Run the process; see the module."""
    options = dict(zip(args[::2], args[1::2], strict=True))
    # The daemon's service manager may signal the whole group; only the daemon itself ends us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(options["--fd"]))
    parent_pid = int(options["--parent"])
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        return EXIT_PARENT_DIED
    if os.getppid() != parent_pid:
        return EXIT_PARENT_DIED
    timeouts = Timeouts(**json.loads(options["--timeouts"]))
    threading.stack_size(256 << 10)
    outbox = Outbox(sock)
    try:
        lockspace = Lockspace.open(options["--device"])
        record = lockspace.snapshot().slot(int(options["--slot"]))
    except (IoFailure, MediaError) as error:
        outbox.event("slot_lost", reason=str(error))
        return EXIT_SLOT_LOST
    ours = (int(options["--incarnation"]), int(options["--nonce"]))
    if record is None or (record.incarnation, record.nonce) != ours:
        outbox.event("slot_lost", reason=f"slot {options['--slot']} was taken before the first beat")
        return EXIT_SLOT_LOST
    refused = make_urgent()
    keeper = Keeper(HeldSlot(record, int(options["--since"])), timeouts)
    outbox.event("started", reason=f"not allowed: {', '.join(refused)}" if refused else "")
    return serve(Beater(lockspace, keeper, timeouts, outbox), outbox, parent)


def arguments(fd: int, device: str, held: HeldSlot, timeouts: Timeouts, parent: int) -> list[str]:
    """Return the command line (after the interpreter) that starts this module for a claimed slot."""
    record = held.record
    options = {
        "--fd": fd,
        "--device": device,
        "--slot": record.slot,
        "--incarnation": record.incarnation,
        "--nonce": record.nonce,
        "--since": held.since_ms,
        "--parent": parent,
        "--timeouts": json.dumps(asdict(timeouts)),
    }
    return ["-m", "mxfsd.heartbeat", *(str(part) for pair in options.items() for part in pair)]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A disk thread that hangs in the kernel must not keep the process.
    sys.stdout.flush()
    os._exit(code)
