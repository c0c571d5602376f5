"""The heartbeat process: writes this node's slot, reads the others', renews the home lease.

``python -m mxfsd.heartbeat --fd N --device D --slot S --incarnation I --nonce X --since MS --parent PID
--watchdog PATH --run-dir PATH --timeouts JSON`` (see ``arguments``)

It is a process of its own, because an event loop that has other things to do is no source of liveness. Two threads:
one does the disk I/O (which may hang), the other one talks to the daemon and watches the time. It talks JSON
datagrams over the SOCK_SEQPACKET socket *fd*: reports, events and acknowledgements out, commands in.

While this node is home the process holds a descriptor of the lower mount (``mxfsd.guard``), and shuts it down before
anything else when the lease ends without a renewal, when slot or lease are lost, or when the daemon is gone.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from mxfs_proto.errors import IoFailure, MediaError, MisuseError, MxfsError
from mxfs_proto.ondisk import Address, LeaseState, SlotRecord, SlotState
from mxfsd import rundir
from mxfsd.caches import DESCRIPTORS, CacheGuard
from mxfsd.core.keeper import Duty, Keeper, LeaseLost, SlotLost, Stalled
from mxfsd.core.lease import HeldLease, HeldSlot, same_lease
from mxfsd.core.timeouts import Timeouts
from mxfsd.core.watch import Snapshot, Watch
from mxfsd.guard import LowerGuard, Watchdog
from mxfsd.io.clock import now_ms
from mxfsd.io.lockspace import ClaimRefused, Lockspace
from mxfsd.io.outbox import Message, Outbox

EXIT_SLOT_LOST = 3
EXIT_PARENT_DIED = 4
MAX_DATAGRAM = 1 << 17
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_TRIAL_S = 0.02
_MIN_WAIT_MS = 20


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


def _beats(slot: SlotRecord) -> bool:
    return slot.state in (SlotState.JOINING, SlotState.ACTIVE, SlotState.RESTARTING)


class Beater:
    """The disk thread: one beat or command after the other."""

    def __init__(
        self,
        lockspace: Lockspace,
        keeper: Keeper,
        timeouts: Timeouts,
        post: Outbox,
        guard: LowerGuard,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.clock = clock
        self.guard = guard
        # The FUSE layer begins kernel_cache_ms / 8 before the end of its lease. An abort ends the mount, so it comes
        # last: a beat before anybody is given what this node cached, node_dead_ms after it was heard last.
        slack_ms = timeouts.node_dead_ms - timeouts.lease_ms - timeouts.heartbeat_ms
        self.caches = CacheGuard(timeouts.kernel_cache_ms // 16, slack_ms, clock)
        self.run_dir = ""
        """Where the processes of this node find each other; empty where there is none."""
        self.lockspace = lockspace
        self.keeper = keeper
        self.timeouts = timeouts
        self.post = post
        self.commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.watch = Watch(timeouts.lease_ms)
        self._known: dict[int, SlotRecord] = {}
        """Each slot as it was read last, from records that could be read."""
        self.others: list[SlotRecord] = []
        """The slots that somebody beats in, or did."""
        self.beats = 0
        self.io_since_ms: int | None = None
        self.ok_ms = clock()
        self.exit_code: int | None = None
        self._still_up = False
        self._ending = threading.Lock()
        """Held while one of the threads stops being home: never during an I/O on the disk."""

    # -- the end of being home: either thread may find it --------------------------------------------------------

    def fence(self, reason: str) -> bool:
        """Shut the lower mount down, if there is one that we guard. False: it is up, and cannot be shut down."""
        try:
            if self.guard.fence():
                self.post.event("lower_down", reason=reason)
        except IoFailure as error:
            if not self._still_up:
                self._still_up = True
                self.post.event("io_error", age_ms=self.clock() - self.ok_ms, reason=str(error))
            return False
        return True

    def check_time(self) -> bool:
        """Stop being home if it is time for that; False: it was. To be called before anything that takes long, and
        first of all after anything that may have taken long (the process may have been stopped)."""
        with self._ending:
            now = self.clock()
            if self.guard.armed and self.keeper.overdue(now):
                self.fence("the lease was not renewed in time")
            lost = self.keeper.expire(now)
            if lost is None and self.guard.fenced and self.keeper.let_go() is not None:
                # The other thread has just written a renewal, too late for this one.
                lost = LeaseLost("the lower mount was shut down")
            if lost is not None:
                self.post.event("lease_lost", reason=lost.reason)
        return lost is None

    # -- the disk thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Beat until told to leave or until the slot is lost."""
        due = self.clock()
        while self.exit_code is None:
            self.check_time()
            command: Message | None = None
            left = due - self.clock()
            if left > 0:
                try:
                    command = self.commands.get(timeout=left / 1000)
                except queue.Empty:
                    continue
            try:
                self.io_since_ms = self.clock()
                if command is not None:
                    self.obey(command)
                else:
                    self.beat()
            except IoFailure as error:
                self.post.event("io_error", age_ms=self.clock() - self.ok_ms, reason=str(error))
            except MxfsError as error:
                self.lose(f"cannot go on: {error}")
            finally:
                self.io_since_ms = None
            if command is None:
                # Beats that were missed are not made up for.
                due = max(due + self.timeouts.heartbeat_ms, self.clock() - self.timeouts.heartbeat_ms)
                due = min(due, self.next_death_ms())
        self.post.wake()

    def beat(self) -> None:
        """Read everything, write what is due, report."""
        self.check_time()
        snap = self.lockspace.snapshot()
        self.watch.observe(snap)
        duties: deque[Duty] = deque(self.keeper.on_read(snap))
        while duties:
            duty = duties.popleft()
            if isinstance(duty, SlotLost):
                self.lose(duty.reason)
                return
            if isinstance(duty, LeaseLost):
                self.fence(duty.reason)
                self.post.event("lease_lost", reason=duty.reason)
            elif isinstance(duty, Stalled):
                self.recover(duty)
                return
            else:
                # We may have been stopped since the read. What is written too late may cover what others wrote.
                if not self.check_time() or self.clock() > self.keeper.slot_until_ms:
                    return
                record = duty.record
                if isinstance(record, SlotRecord):
                    self.lockspace.write_slot(record)
                else:
                    self.lockspace.write_lease(record)
                result = self.keeper.on_written(duty, snap.began_ms, self.clock())
                if result is not None:
                    duties.append(result)
        self.ok_ms = self.clock()
        self.others = [
            slot for slot in snap.slots if slot is not None and slot.slot != self.keeper.record.slot and _beats(slot)
        ]
        self.beats += 1
        if self.check_time():
            self.guard.feed()
        self.post.report(self.report(snap))

    def next_death_ms(self) -> int:
        """When to read, out of turn, so that a node which does not move is found dead without losing up to a beat."""
        dead, now = self.timeouts.node_dead_ms, self.clock()
        dues = [self.watch.due_ms(record.slot, dead) for record in self.others]
        return min((due for due in dues if due is not None and due > now), default=now + self.timeouts.heartbeat_ms)

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
        """The slot is not ours: stop being home, tell the daemon, and end."""
        self.fence(reason)
        self.keeper.let_go()
        self.post.event("slot_lost", reason=reason)
        self.exit_code = EXIT_SLOT_LOST

    def obey(self, command: Message) -> None:
        """Execute one command; answer it with ``ack`` and, if it failed, ``error``."""
        name, answer = command.get("cmd"), {"ack": command.get("id")}
        try:
            if name == "home":
                answer |= self.home(command)
            elif name in ("no_home", "leave") and self.guard.armed:
                answer["error"] = "the lower mount is guarded still: disarm first"
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
            elif name == "leave":
                self.end(SlotState.LEFT)
                self.exit_code = 0
            elif name == "gasp":
                self.exit_code = EXIT_PARENT_DIED
                if self.nothing_mounted():
                    self.end(SlotState.RESTARTING if self.daemon_comes_again() else SlotState.FAILED)
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
        if self.guard.fenced:
            return {"error": "this home was shut down"}
        lease = self.lockspace.read_lease()
        mine = (self.keeper.record.node_uuid, self.keeper.record.incarnation)
        if (
            lease.epoch != command["epoch"]
            or (lease.owner_uuid, lease.incarnation) != mine
            or lease.state is not LeaseState.HELD
        ):
            return {"error": f"the lease is not ours: epoch {lease.epoch}, slot {lease.owner_slot}"}
        lost = self.keeper.hold(HeldLease(lease, command["since_ms"]), self.clock())
        if lost is not None:
            return {"error": lost.reason}
        self.beat()
        held = self.keeper.lease
        return {} if held is not None and same_lease(held, lease) else {"error": "the lease was lost at once"}

    def daemon_comes_again(self) -> bool:
        """Whether the FUSE layer lives: then another daemon goes on with what this node holds."""
        fuse = rundir.recall(self.run_dir, rundir.FUSE) if self.run_dir else None
        return fuse is not None and fuse.alive

    def nothing_mounted(self) -> bool:
        """Whether FAILED may be said: the lower mount that we guarded is gone, and there is no other.

        It is not enough that it was shut down: what it had sent to the disk before may be under way still. And with a
        lease and no mount to guard, the daemon was mounting or unmounting when it died: a process that maps a file may
        keep the mount up after it. An exclusive open of the device, which no mounted one allows, tells both.
        """
        if self.guard.armed:
            return False
        if not self.guard.fenced and self.keeper.lease is None:
            return True
        deadline = self.clock() + self.timeouts.lease_ms
        while True:
            try:
                os.close(os.open(self.lockspace.disk.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            except OSError:
                if self.clock() >= deadline:
                    return False
                time.sleep(_TRIAL_S)
            else:
                return True

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
        # A record that cannot be read counts as unchanged: a torn write must not make a node vanish.
        self._known.update((slot.slot, slot) for slot in snap.slots if slot is not None)
        slots = [
            slot_json(slot, self.watch.age_ms(slot.slot))
            for _number, slot in sorted(self._known.items())
            if slot.state is not SlotState.FREE and slot.slot != own.slot
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


def serve(beater: Beater, outbox: Outbox, parent: int) -> int:
    """Run until the beater ends or the daemon dies; return the exit code."""
    thread = threading.Thread(target=beater.run, name="disk", daemon=True)
    thread.start()
    poll = select.poll()
    for fd in (outbox.sock.fileno(), outbox.wake_fd, parent):
        poll.register(fd, select.POLLIN)
    fuse = -1
    period = beater.timeouts.heartbeat_ms
    warned = 0
    while beater.exit_code is None:
        beater.check_time()
        ready = dict(poll.poll(_wait_ms(beater, outbox.flush())))
        # The time comes before everything else: the disk thread may hang, and this process may have been stopped.
        beater.check_time()
        outbox.drain()
        if fuse >= 0 and fuse in ready:
            poll.unregister(fuse)
            beater.caches.fuse_ended()
        beater.caches.check()
        gone = parent in ready
        if not gone and outbox.sock.fileno() in ready:
            gone = not receive(beater, outbox.sock)
            if fuse != beater.caches.pidfd and beater.caches.pidfd >= 0:
                poll.register(beater.caches.pidfd, select.POLLIN)
            fuse = beater.caches.pidfd
        if gone:
            return gasp(beater, thread)
        if not thread.is_alive() and beater.exit_code is None:
            beater.lose("the disk thread has failed")
        since = beater.io_since_ms
        now = beater.clock()
        if since is not None and now - since > 2 * period and now - warned > period:
            warned = now
            outbox.event("io_error", age_ms=now - beater.ok_ms, reason=f"an I/O hangs since {now - since} ms")
    # Events and the last acknowledgement must arrive.
    deadline = beater.clock() + beater.timeouts.io_timeout_ms
    while outbox.flush() and beater.clock() < deadline:
        time.sleep(0.005)
    return beater.exit_code


def _wait_ms(beater: Beater, unsent: bool) -> int:
    """Return for how long nothing need be looked at."""
    wait = _MIN_WAIT_MS if unsent else beater.timeouts.heartbeat_ms // 2
    now = beater.clock()
    dues = [beater.keeper.fence_at_ms if beater.guard.armed else None, beater.caches.due_ms]
    for left in [due - now for due in dues if due is not None]:
        wait = min(wait, left if left > 0 else _MIN_WAIT_MS)
    return wait


def receive(beater: Beater, sock: socket.socket) -> bool:
    """Pass one command on, or obey it if it needs no disk; return False when the daemon has closed its end."""
    try:
        data, fds, _flags, _address = socket.recv_fds(sock, MAX_DATAGRAM, DESCRIPTORS, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if not data:
        return False
    try:
        command = json.loads(data)
        name, answer = command.get("cmd"), {"ack": command.get("id")}
    except (ValueError, AttributeError):
        return True
    try:
        if name == "arm":
            beater.guard.arm(fds.pop(0))
            beater.check_time()
            if beater.guard.fenced:
                answer["error"] = "the lease was over before the lower mount came"
        elif name == "disarm":
            beater.guard.disarm()
        elif name == "watch_fuse":
            taken, fds = fds, []
            beater.caches.watch(command["pid"], taken)
        elif name == "lease":
            beater.caches.tell(command["until_ms"])
            return True
        elif name == "caches":
            threading.Thread(target=_answer_when_settled, args=(beater, answer), daemon=True).start()
            return True
        else:
            beater.commands.put(command)
            return True
    except (IndexError, KeyError, MisuseError, IoFailure) as error:
        answer["error"] = str(error)
    finally:
        for fd in fds:
            os.close(fd)
    beater.post.put(answer)
    return True


def _answer_when_settled(beater: Beater, answer: Message) -> None:
    if not beater.caches.settle():
        answer["error"] = "what the kernel caches of the mount could not be dropped"
    beater.post.put(answer)


def gasp(beater: Beater, thread: threading.Thread) -> int:
    """The daemon died: shut the lower mount down, see that nothing cached is served here any more, and say so in the
    slot, so that others need not wait for our counter to stand still."""
    at = beater.keeper.fence_at_ms
    try:
        beater.guard.flush_and_fence(0 if at is None else (at - beater.clock()) / 1000)
    except IoFailure as error:
        beater.post.event("io_error", reason=str(error))
    if beater.guard.flushed and beater.run_dir:
        # The FUSE layer must know whether what was written through it is on the disk.
        with suppress(OSError):  # it then takes it for lost
            rundir.remember(beater.run_dir, rundir.FLUSHED, os.getpid())
    if beater.caches.settle():
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
    watchdog = None
    if options["--watchdog"]:
        limit_ms = timeouts.node_dead_ms - timeouts.lease_ms
        watchdog = Watchdog(options["--watchdog"], timeouts.watchdog_ms, limit_ms)
    outbox.event("started", reason=f"not allowed: {', '.join(refused)}" if refused else "")
    beater = Beater(lockspace, keeper, timeouts, outbox, LowerGuard(watchdog))
    beater.run_dir = options["--run-dir"]
    try:
        return serve(beater, outbox, parent)
    except BaseException:
        beater.fence("the heartbeat process has failed")
        raise


def arguments(
    fd: int, device: str, held: HeldSlot, timeouts: Timeouts, parent: int, watchdog: str = "", run_dir: str = ""
) -> list[str]:
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
        "--watchdog": watchdog,
        "--run-dir": run_dir,
        "--timeouts": json.dumps(asdict(timeouts)),
    }
    return ["-m", "mxfsd.heartbeat", *(str(part) for pair in options.items() for part in pair)]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A disk thread that hangs in the kernel must not keep the process.
    sys.stdout.flush()
    os._exit(code)
