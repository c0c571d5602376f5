"""A daemon dies under a live mount: its successors, the hand-shake with the FUSE layer, and what the lower mount took
with it. Nothing is mounted here; tests/lab/test_daemon_restart.py has the real thing."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyfuse3 import RequestContext

from mxfs_fuse import loss, operations
from mxfs_fuse.callers import caller, is_dying, is_unmounting
from mxfs_fuse.loss import LowerEnd, may_be_redone
from mxfs_fuse.nextdaemon import NextDaemon, launch
from mxfs_fuse.state import State
from mxfs_proto.errors import MxfsError, PeerError, Refusal
from mxfs_proto.frames import Frame, FrameType, encode_header, pack_json, unpack_json
from mxfs_proto.lockflags import LockFlag
from mxfs_proto.ondisk import SlotState, volume_id
from mxfs_proto.ops import Fid, Op
from mxfs_proto.records import DaemonReady, Opens, Record, RecoveryStart
from mxfsd import greeting, reattach, rundir
from mxfsd.fuselink import FuseLink
from mxfsd.io.netlink import NetlinkEndpoint
from mxfsd.io.unixconn import UnixFrameConnection, connect_unix

VOLUME = uuid.UUID("00000000-0000-4000-8000-000000000001")
ROOT = Fid(128, 1)


# -- the next daemon ---------------------------------------------------------------------------------------------------


class Children:
    """Stands for subprocess.Popen: notes when daemons were started; ``status`` is what each ends with at once."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.status: int | None = 1
        self.fails = False
        self.now = 0

    def start(self, command: Sequence[str]) -> Any:
        assert list(command) == ["mxfsd"]
        if self.fails:
            raise OSError(errno.ENOENT, "no such program")
        self.started.append(self.now)
        return SimpleNamespace(pid=1, poll=lambda: self.status)

    def run(self, outage: NextDaemon, until_ms: int, *, connected: bool = False) -> int | None:
        """Step every 10 ms; return when it gave up."""
        while self.now < until_ms:
            if not outage.step(self.now, connected):
                return self.now
            self.now += 10
        return None


def test_a_daemon_that_ends_is_started_again_with_longer_and_longer_pauses() -> None:
    children = Children()
    children.run(NextDaemon(["mxfsd"], 10_000, 0, children.start), 9000)
    pauses = [after - before for before, after in zip(children.started, children.started[1:], strict=False)]
    assert pauses[:4] == [60, 110, 210, 410]
    assert max(pauses) <= 2010


def test_a_daemon_that_runs_is_the_only_one() -> None:
    children = Children()
    children.status = None
    children.run(NextDaemon(["mxfsd"], 10_000, 0, children.start), 9000)
    assert children.started == [0]


@pytest.mark.error_logs
@pytest.mark.parametrize("fails", [False, True])
def test_there_is_an_end_to_it(fails: bool) -> None:
    children = Children()
    children.fails = fails
    assert children.run(NextDaemon(["mxfsd"], 1000, 0, children.start), 5000) == 1000


def test_a_daemon_that_is_connected_has_all_the_time_it_needs() -> None:
    children = Children()
    children.status = None
    assert children.run(NextDaemon(["mxfsd"], 1000, 0, children.start), 5000, connected=True) is None


def test_under_systemd_nothing_is_started_here() -> None:
    children = Children()
    assert children.run(NextDaemon([], 1000, 0, children.start), 5000) == 1000
    assert children.started == []


def test_a_daemon_on_its_way_is_ended_when_nobody_waits_for_it() -> None:
    """It would otherwise meet the next mount, whose daemon waits for its end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(_command: Sequence[str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return started[-1]

    outage = NextDaemon(["mxfsd"], 1000, 0, start)
    assert outage.step(0, connected=False)
    (child,) = started
    try:
        assert child.poll() is None
        outage.abandon()
        assert child.poll() == -signal.SIGKILL
        outage.abandon()
    finally:
        child.kill()
        child.communicate()


def test_a_daemon_is_told_whom_it_goes_on_with() -> None:
    done = launch([sys.executable, "-c", f"import sys; sys.exit(sys.argv[1:] != ['--fuse-pid', '{os.getpid()}'])"])
    assert isinstance(done, subprocess.Popen)
    assert done.wait(20) == 0


# -- the run directory -------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_more_than_its_pid(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    rundir.remember(tmp_path, rundir.FUSE, child.pid)
    found = rundir.recall(tmp_path, rundir.FUSE)
    assert found is not None and found.alive
    assert not rundir.Process(found.pid, found.start + 1).alive  # the pid was given to another process
    child.communicate()
    assert not found.alive
    (tmp_path / rundir.FUSE).write_text("torn [")
    assert rundir.recall(tmp_path, rundir.FUSE) is None
    rundir.forget(tmp_path, rundir.FUSE, rundir.HEARTBEAT)
    assert not (tmp_path / rundir.FUSE).exists()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = rundir.process(child.pid)
    assert found is not None and not found.alive
    child.wait()


# -- the hand-shake ----------------------------------------------------------------------------------------------------


class Link:
    """A daemon's FuseLink, and the FUSE layer of an earlier daemon's (this process) that connects to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gone: list[str] = []
        self.frames: list[Frame] = []
        self.records: list[Record] = []
        self.taken: list[tuple[FrameType, int]] = []
        self.said: list[Record] = []
        self.link = FuseLink(folder, VOLUME, self._frame, self.said.append, self.gone.append)
        self.netlink = NetlinkEndpoint(self.records.append, volume_id(VOLUME.bytes))
        self.conn: UnixFrameConnection | None = None

    def _frame(self, frame: Frame) -> None:
        self.taken.append((frame.type, frame.seq))

    def reclaim(self, number: int, *kinds: FrameType) -> None:
        assert self.conn is not None
        for kind in kinds:
            self.conn.send(kind, [b""], 5, 0, number)

    async def adopt(self, limit_s: float = 5) -> None:
        mine = rundir.process(os.getpid())
        assert mine is not None
        await self.link.adopt(mine, limit_s)

    async def meet(self) -> None:
        """Adopt this process, which is of node 3, incarnation 7."""
        adopting = asyncio.create_task(self.adopt())
        await until(lambda: (self.folder / "daemon.sock").exists())
        self.dial(node=3, incarnation=7)
        await adopting

    def dial(self, **fields: Any) -> None:
        path = str(self.folder / "daemon.sock")
        self.conn = connect_unix(path, lambda _conn, frame: self.frames.append(frame), lambda _conn, _error: None)
        hello = {"portid": self.netlink.open(), "pid": os.getpid(), **fields}
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(HELLO_FDS)]
        self.conn.send(FrameType.FUSE_HELLO, [pack_json(hello)], fds=fds)
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        if self.conn is not None:
            self.conn.close()
        self.netlink.close()
        self.link.refuse("the end of the test")  # so that close() does not end this process
        self.link.close()


try:  # what the heartbeat process ends the caches with travels in the same frame
    from mxfsd.caches import DESCRIPTORS as HELLO_FDS
except ImportError:
    HELLO_FDS = 0


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_an_older_fuse_layer_is_welcomed_and_asked_what_it_holds(tmp_path: Path) -> None:
    both = Link(tmp_path)
    try:
        await both.meet()
        assert (both.link.adopted, both.link.continues, both.link.slot) == (True, 7, 3)
        assert both.link.served and not both.link.attached.is_set()
        both.link.welcome({"node": 3, "epoch": 5, "home": 1})
        await until(lambda: both.frames)
        welcome = unpack_json(both.frames[0].payload)
        both.netlink.connect(int(welcome["portid"]))
        await until(lambda: len(both.records) == 2)
        assert isinstance(both.records[0], DaemonReady)
        assert both.records[1] == RecoveryStart(5, 1, 1)  # nothing is served before it has named its locks
    finally:
        both.close()


async def test_what_answers_an_earlier_question_is_not_taken_for_the_answer(tmp_path: Path) -> None:
    """The connection to the home was lost in the middle of the reclaims, and is there again: the rest of them alone
    would say that this node holds, and has open, next to nothing."""
    both = Link(tmp_path)
    try:
        await both.meet()
        both.link.welcome({"node": 3, "epoch": 5, "home": 1})
        await until(lambda: both.frames)
        both.netlink.connect(int(unpack_json(both.frames[0].payload)["portid"]))
        both.link.freeze(5, 1)
        await until(lambda: len(both.records) == 3)
        assert both.records[1:] == [RecoveryStart(5, 1, 1), RecoveryStart(5, 1, 2)]
        both.netlink.send(Opens(99, 0, 0, LockFlag.NONE))  # said before the question came
        both.reclaim(1, FrameType.RECLAIM, FrameType.RECLAIM_DONE)
        both.reclaim(2, FrameType.RECLAIM, FrameType.RECLAIM_DONE)
        await until(lambda: (FrameType.RECLAIM_DONE, 2) in both.taken)
        assert both.taken == [(FrameType.RECLAIM, 2), (FrameType.RECLAIM_DONE, 2)]
        await asyncio.sleep(0.05)
        assert both.said == []
        both.link.resume(5, 1, False, [], -1)
        both.netlink.send(Opens(99, 1, 0, LockFlag.NONE))
        await until(lambda: both.said)
        assert both.said == [Opens(99, 1, 0, LockFlag.NONE)]
    finally:
        both.close()


async def test_why_a_fuse_layer_failed_is_heard_though_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is noticed at once, before its last frame may have been read."""
    reason = pack_json({"reason": "no mount point"})
    frame = encode_header(FrameType.REFUSE, len(reason), 0, 0, 0) + reason
    script = f"import socket; s = socket.socket(1); s.connect({str(tmp_path / 'daemon.sock')!r}); s.send({frame!r})"
    popen = subprocess.Popen
    monkeypatch.setattr(
        "mxfsd.fuselink.subprocess.Popen", lambda *_args, **_more: popen([sys.executable, "-c", f"{script}; exit(1)"])
    )
    gone: list[str] = []
    link = FuseLink(tmp_path, VOLUME, lambda _frame: None, lambda _record: None, gone.append)
    loop = asyncio.get_running_loop()
    await link.start("/nowhere", (), "x", "info", channel="native", local_locks=False)
    try:
        add_reader = loop.add_reader

        def late(fd: int, *args: Any) -> None:  # the socket is looked at a moment later than the process
            loop.call_later(0.05, add_reader, fd, *args)

        monkeypatch.setattr(loop, "add_reader", late)
        await until(lambda: gone)
        assert gone == ["no mount point"]
    finally:
        assert link._process is not None
        await until(lambda: link._process.poll() is not None)  # type: ignore[union-attr]
        link.close()


async def test_nothing_is_sent_to_a_fuse_layer_whose_socket_is_gone(tmp_path: Path) -> None:
    """Its end is told a moment later; what an operation of another node sends it meanwhile is no error of that one."""
    both = Link(tmp_path)
    try:
        await both.meet()
        both.link.welcome({"node": 3, "epoch": 5, "home": 1})
        both.netlink.close()
        for _ in range(3):  # the first finds out
            both.link.record(RecoveryStart(5, 1, 1))
        await asyncio.sleep(0)
        both.link.record(RecoveryStart(5, 1, 1))
    finally:
        both.close()


async def test_a_fuse_layer_that_does_not_come_or_has_ended(tmp_path: Path) -> None:
    both = Link(tmp_path)
    try:
        with pytest.raises(MxfsError, match="did not connect"):
            await both.adopt(0.05)
        child = subprocess.Popen(["true"])
        ended = rundir.process(child.pid)
        assert ended is not None
        child.wait()
        with pytest.raises(MxfsError, match="has ended"):
            await both.link.adopt(ended, 5)
    finally:
        both.close()


async def test_a_node_that_is_out_tells_its_fuse_layer(tmp_path: Path) -> None:
    both = Link(tmp_path)
    try:
        await both.meet()
        both.link.refuse("put out")
        await until(lambda: both.frames)
        assert (both.frames[0].type, unpack_json(both.frames[0].payload)) == (FrameType.REFUSE, {"reason": "put out"})
    finally:
        both.close()


async def test_a_connection_that_breaks_is_no_state_to_stay_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxfsd.fuselink._LOST_S", 0.01)
    both = Link(tmp_path)
    broken: list[str] = []
    both.link.on_broken = broken.append
    try:
        await both.meet()
        assert both.conn is not None
        both.conn.close()
        await until(lambda: broken)
        assert both.gone == []
    finally:
        both.close()


@pytest.mark.parametrize(
    ("state", "node", "member"),
    [
        (SlotState.RESTARTING, b"n" * 16, True),
        (SlotState.FAILED, b"n" * 16, True),
        (SlotState.FREE, b"n" * 16, False),
        (SlotState.ACTIVE, b"x" * 16, False),
        (None, b"", False),
    ],
)
def test_a_node_whose_slot_was_taken_holds_nothing_any_more(state: SlotState | None, node: bytes, member: bool) -> None:
    record = None if state is None else SimpleNamespace(state=state, node_uuid=node)
    lockspace = SimpleNamespace(read_slots=lambda: (None, None, record))
    identity = SimpleNamespace(node=SimpleNamespace(bytes=b"n" * 16))
    daemon: Any = SimpleNamespace(fuse=SimpleNamespace(continues=6, slot=3), lockspace=lockspace, identity=identity)
    if member:
        reattach.still_a_member(daemon)
    else:
        with pytest.raises(Refusal, match="put out"):
            reattach.still_a_member(daemon)
    daemon.fuse.continues = 0
    reattach.still_a_member(daemon)


def test_a_hello_says_what_it_continues() -> None:
    fields = unpack_json(greeting.hello("n2", 2, "fast", "lease", 6))
    assert greeting.continued(fields) == 6
    assert greeting.continued(unpack_json(greeting.hello("n2", 2, "fast", "lease"))) == 0
    with pytest.raises(PeerError):
        greeting.continued({"continues": "x"})


def test_locks_do_not_go_on_in_another_slot() -> None:
    fuse = SimpleNamespace(continues=6, slot=3)
    reattach.check_slot(SimpleNamespace(fuse=fuse, slot=3))  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="slot 3"):
        reattach.check_slot(SimpleNamespace(fuse=fuse, slot=4))  # type: ignore[arg-type]


async def test_a_daemon_does_not_mount_again_what_was_unmounted(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    rundir.remember(tmp_path, rundir.FUSE, child.pid)
    child.wait()
    started: list[str] = []
    fuse = SimpleNamespace(start=started.append)
    daemon: Any = SimpleNamespace(
        run_dir=tmp_path, fuse=fuse, mountpoint="/nowhere/at/all", device="/dev/none", goes_on_with=0
    )
    with pytest.raises(reattach.NothingToServe):
        await reattach.start_fuse(daemon, ())
    (tmp_path / rundir.DEAD).write_text("given up")
    rundir.remember(tmp_path, rundir.FUSE, os.getpid())
    with pytest.raises(reattach.NothingToServe, match="dead"):
        await reattach.start_fuse(daemon, ())
    assert started == []


async def test_a_daemon_leaves_a_later_mount_alone(tmp_path: Path) -> None:
    """The mount that it was started for is gone; the run directory is that of nobody yet, or of the next mount."""
    daemon: Any = SimpleNamespace(run_dir=tmp_path, fuse=SimpleNamespace(), goes_on_with=os.getpid())
    with pytest.raises(reattach.NothingToServe):
        await reattach.start_fuse(daemon, ())
    rundir.remember(tmp_path, rundir.FUSE, os.getppid())
    with pytest.raises(reattach.NothingToServe):
        await reattach.start_fuse(daemon, ())
    assert rundir.recall(tmp_path, rundir.DAEMON) is None


async def test_while_a_daemon_hangs_its_heartbeat_process_lives(tmp_path: Path) -> None:
    """Killed and stuck in the kernel, it may write yet: what would shut its lower mount down in time must not be ended,
    nor may a second attempt forget who hangs."""
    script = [sys.executable, "-c", "input()"]
    hangs, beats = (subprocess.Popen(script, stdin=subprocess.PIPE) for _ in range(2))
    rundir.remember(tmp_path, rundir.FUSE, os.getpid())
    rundir.remember(tmp_path, rundir.DAEMON, hangs.pid)
    rundir.remember(tmp_path, rundir.HEARTBEAT, beats.pid)
    before = rundir.recall(tmp_path, rundir.DAEMON)

    async def adopt(_process: rundir.Process, _limit_s: float) -> None:
        pass

    fuse = SimpleNamespace(adopt=adopt, continues=0)
    timeouts = SimpleNamespace(restart_ms=1000, node_dead_ms=50, lease_ms=10, io_timeout_ms=10)
    daemon: Any = SimpleNamespace(run_dir=tmp_path, fuse=fuse, timeouts=timeouts, goes_on_with=os.getpid())
    try:
        for _ in range(2):
            with pytest.raises(MxfsError, match=f"pid {hangs.pid}"):
                await reattach.start_fuse(daemon, ())
            assert beats.poll() is None
            assert rundir.recall(tmp_path, rundir.DAEMON) == before
        hangs.communicate()
        beats.communicate()
        await reattach.start_fuse(daemon, ())
        mine = rundir.recall(tmp_path, rundir.DAEMON)
        assert mine is not None and mine.pid == os.getpid()
    finally:
        for child in (hangs, beats):
            child.kill()
            child.wait()


def test_a_mount_that_is_busy_is_tried_again_for_a_while() -> None:
    codes = [errno.EBUSY, errno.EBUSY, 0]

    def work() -> str:
        code = codes.pop(0)
        if code:
            raise OSError(code, "mount")
        return "mounted"

    assert reattach.patiently(work, 10_000) == "mounted"
    codes[:] = [errno.EUCLEAN, 0]
    with pytest.raises(OSError):
        reattach.patiently(work, 10_000)
    codes[:] = [errno.EBUSY] * 3
    with pytest.raises(OSError):
        reattach.patiently(work, -1)


# -- the FUSE layer without a home -------------------------------------------------------------------------------------


@pytest.fixture
async def state() -> State:
    made = State(ROOT, 1000, False, lambda _record: None)
    made.gate = None
    return made


async def test_a_dead_mount_fails_what_waits_and_what_comes(state: State) -> None:
    state.close_gate()
    waiting = [asyncio.create_task(state.pass_gate()), asyncio.create_task(state.link.ship(Op.REAP, 0, 0, ROOT))]
    await asyncio.sleep(0)
    state.die("no daemon")
    for work in (*waiting, state.pass_gate(), state.link.ship(Op.REAP, 0, 0, ROOT)):
        with pytest.raises(OSError) as failed:
            await work
        assert failed.value.errno == errno.EIO


async def test_who_is_being_killed_waits_no_longer(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxfs_fuse.state.LOOK_S", 0.01)
    state.close_gate()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    caller.set(child.pid)
    waiting = asyncio.create_task(state.pass_gate())
    await asyncio.sleep(0.05)
    assert not waiting.done() and not is_dying(child.pid)
    child.communicate()
    with pytest.raises(OSError) as failed:
        await waiting
    assert failed.value.errno == errno.EINTR


async def test_a_request_that_names_nobody_does_not_wait_for_the_caller_before(state: State) -> None:
    class Some:
        def __init__(self) -> None:
            self.state = state
            self.names_callers = True

        @operations._errno_boundary
        async def operation(self, *_args: Any) -> int:
            return caller.get()

    context = RequestContext.__new__(RequestContext)
    some = Some()
    caller.set(77)  # as the request before left it: pyfuse3 serves both in one task
    assert await some.operation(1) == 0
    assert await some.operation(1, context) == context.pid
    some.names_callers = False  # a channel of our own has said who asks, of every request
    caller.set(77)
    assert await some.operation(1) == 77


def test_umount_is_recognized() -> None:
    assert not is_unmounting(os.getpid())
    assert not is_unmounting(0)


class Lower:
    """A lower mount: *up*, and what syncfs says."""

    def __init__(self, syncs: bool = True) -> None:
        self.up = True
        self.syncs = syncs
        self.closed = False

    @property
    def mount_fd(self) -> int:
        return 0

    def syncfs(self) -> None:
        if not self.syncs:
            raise OSError(errno.EIO, "shut down")

    def sync(self, _fid: Fid) -> None:
        self.syncfs()

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "is_down", lambda lower: not lower.up)
    monkeypatch.setattr("mxfs_fuse.state.is_down", lambda lower: not lower.up)


async def end_of(state: State, folder: Path, heartbeat: rundir.Process | None) -> None:
    state.close_gate()
    await LowerEnd(state, folder, heartbeat, 0.05).leave()


async def test_what_is_synced_as_the_daemon_dies_is_not_lost(state: State, tmp_path: Path) -> None:
    lower: Any = Lower()
    state.lower = lower
    node = state.known(Fid(200, 1))
    state.changed(200)
    await end_of(state, tmp_path, None)
    assert lower.closed and state.lower is None
    assert state.kept_all and not node.behind_error and not state.unsynced


@pytest.mark.error_logs
@pytest.mark.parametrize("flushed", [True, False])
async def test_what_the_kernel_wrote_is_not_covered_by_a_flush_of_ours(
    state: State, tmp_path: Path, flushed: bool
) -> None:
    """It may have written more behind it: only a shutdown that froze XFS first is proof."""
    lower: Any = Lower()
    state.lower = lower
    plain, pinned = state.known(Fid(200, 1)), state.known(Fid(201, 1))
    state.changed(200)
    own = rundir.process(os.getpid())
    if flushed:
        rundir.remember(tmp_path, rundir.FLUSHED, os.getpid())
    state.close_gate()
    await LowerEnd(state, tmp_path, own, 0.05).leave([pinned])
    assert (plain.behind_error, pinned.behind_error) == (0, 0 if flushed else errno.EIO)


@pytest.mark.error_logs
@pytest.mark.parametrize("flushed", [True, False])
async def test_a_shut_down_mount_lost_nothing_only_where_its_flush_is_proved(
    state: State, tmp_path: Path, flushed: bool
) -> None:
    lower: Any = Lower(syncs=False)
    state.lower = lower
    node, other = state.known(Fid(200, 1)), state.known(Fid(201, 1))
    state.changed(200)
    heartbeat = rundir.process(os.getpid())
    if flushed:
        rundir.remember(tmp_path, rundir.FLUSHED, os.getpid())
    await end_of(state, tmp_path, heartbeat)
    assert state.kept_all is flushed
    assert node.behind_error == (0 if flushed else errno.EIO)
    assert other.behind_error == 0


async def test_the_word_of_an_earlier_heartbeat_process_does_not_count(state: State, tmp_path: Path) -> None:
    state.lower = Lower(syncs=False)  # type: ignore[assignment]
    rundir.remember(tmp_path, rundir.FLUSHED, os.getppid())
    await end_of(state, tmp_path, rundir.process(os.getpid()))
    assert not state.kept_all


async def test_a_file_synced_before_has_lost_nothing(state: State, tmp_path: Path) -> None:
    lower: Any = Lower()
    state.lower = lower
    node = state.known(Fid(200, 1))
    state.changed(200)
    await state.sync_local(node)
    lower.syncs = False
    await end_of(state, tmp_path, None)
    assert not node.behind_error


async def test_a_sync_that_failed_leaves_the_file_unsynced(state: State) -> None:
    state.lower = Lower(syncs=False)  # type: ignore[assignment]
    state.changed(200)
    with pytest.raises(OSError):
        await state.sync_local(state.known(Fid(200, 1)))
    assert state.unsynced == {200}


@pytest.mark.parametrize(
    ("operation", "kept", "again"),
    [("rename", True, True), ("write", True, True), ("rename", False, False), ("write", False, False)]
    + [("read", False, True), ("fsync", False, True)],
)
async def test_what_a_shut_down_mount_refused_is_done_again_if_that_is_safe(
    state: State, operation: str, kept: bool, again: bool
) -> None:
    lower: Any = Lower()
    state.lower = lower
    told: list[int] = []
    state.on_lower_down = lambda: told.append(1)
    lower.up = False
    deciding = asyncio.create_task(may_be_redone(state, lower, errno.EIO, operation))
    await asyncio.sleep(0)
    assert not deciding.done() and told == [1]  # it waits for the next home
    state.lower = None
    state.lower_ended(kept)
    state.open_gate()
    assert await deciding is again


async def test_an_error_of_a_mount_that_is_up_is_an_error(state: State) -> None:
    lower: Any = Lower()
    state.lower = lower
    assert not await may_be_redone(state, lower, errno.EIO, "read")
    lower.up = False
    assert not await may_be_redone(state, lower, errno.ENOSPC, "read")
    assert not await may_be_redone(state, None, errno.EIO, "read")


async def test_a_lock_whose_lower_mount_ended_is_not_kept_for_ever(state: State) -> None:
    lower: Any = Lower(syncs=False)
    state.lower = lower
    with pytest.raises(OSError):
        await state._before_release(lower.syncfs)  # an error of a mount that is up: the lock stays
    lower.up = False
    giving = asyncio.create_task(state._before_release(lower.syncfs))
    await asyncio.sleep(0.02)
    assert not giving.done()
    await state.leave_lower()
    await giving
