"""The daemon's part of a restart under a live mount: go on with the FUSE layer that the daemon before had.

The run directory tells: it names the FUSE layer (`mxfsd.rundir`), and mount.mxfs clears that before a new mount. So a
daemon that finds a FUSE layer alive goes on with it; one that finds it ended has nothing to serve, and must not mount
again by itself what somebody unmounted meanwhile.
"""

import asyncio
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import structlog

from mxfs_proto.errors import MisuseError, MxfsError, Refusal
from mxfs_proto.ondisk import SlotState
from mxfsd import mountinfo, rundir
from mxfsd.core.lease import ENDED
from mxfsd.guard import LowerGuard
from mxfsd.io.clock import now_ms
from mxfsd.options import MountOptions

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

log = structlog.get_logger(__name__)

T = TypeVar("T")

EXIT_FAILED = 3
"""Exit status of a daemon that ended as in a crash: start it again."""
_POLL_S = 0.02
_UMOUNT_S = 10.0


class NothingToServe(MxfsError):
    """The mount that this daemon was to go on with is gone: no failure, and no reason to try again."""


def channel_of(options: MountOptions) -> str:
    """Return the channel to the kernel: our own wants FUSE 7.31 (Linux 5.4). Raises MisuseError."""
    release = [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]]
    if options.channel or release >= [5, 4]:
        return options.channel or "native"
    if not options.local_flocks:
        raise MisuseError("this kernel is older than Linux 5.4: file locks hold on each node alone, say localflocks")
    return "pyfuse3"


async def start_fuse(daemon: "Daemon", kernel_options: tuple[str, ...]) -> None:
    """Start the FUSE layer, or go on with the one there is. Raises MxfsError."""
    assert daemon.fuse is not None
    before = rundir.recall(daemon.run_dir, rundir.FUSE)
    if daemon.goes_on_with and (before is None or before.pid != daemon.goes_on_with):
        raise NothingToServe("the mount that this daemon was started for has ended")
    if before is None:
        rundir.remember(daemon.run_dir, rundir.DAEMON, os.getpid())
        options = daemon.options
        await daemon.fuse.start(
            daemon.mountpoint,
            kernel_options,
            daemon.device,
            options.log,
            channel=channel_of(options),
            local_locks=options.local_flocks,
            passthrough=options.passthrough,
        )
        return
    if (daemon.run_dir / rundir.DEAD).exists():
        raise NothingToServe("the mount is dead: unmount it, and mount again")
    if not before.alive:
        await asyncio.to_thread(clear_dead_mount, daemon.mountpoint, daemon.device)
        rundir.forget(daemon.run_dir, rundir.FUSE, rundir.DEAD)
        raise NothingToServe("the mount has ended while no daemon ran")
    log.info("going on with a FUSE layer", fuse_pid=before.pid)
    await daemon.fuse.adopt(before, daemon.timeouts.restart_ms / 1000)
    await _daemon_ended(daemon)
    # Only now: a daemon after this one would not know any more that the one before hangs.
    rundir.remember(daemon.run_dir, rundir.DAEMON, os.getpid())
    await _heartbeat_ended(daemon)
    await asyncio.to_thread(still_a_member, daemon)


async def _daemon_ended(daemon: "Daemon") -> None:
    """Wait until the daemon before is gone: while it hangs in the kernel, killed or not, its lower mount may be written
    to, and its heartbeat process, which would end the mount in time, must live. Raises MxfsError."""
    before = rundir.recall(daemon.run_dir, rundir.DAEMON)
    if before is None:
        return
    if not await _ends(before, daemon.timeouts.node_dead_ms):
        raise MxfsError(f"the daemon before (pid {before.pid}) does not end")


async def _heartbeat_ended(daemon: "Daemon") -> None:
    """Wait until the heartbeat process of the daemon before has shut down what it had to and said so in the slot."""
    before = rundir.recall(daemon.run_dir, rundir.HEARTBEAT)
    if before is None:
        return
    # It ends by itself before the lease does; one that still runs then hangs in its disk.
    if not await _ends(before, daemon.timeouts.lease_ms + daemon.timeouts.io_timeout_ms):
        log.warning("the heartbeat process before does not end", heartbeat_pid=before.pid)
        os.kill(before.pid, signal.SIGKILL)
        raise MxfsError("the heartbeat process of the daemon before hangs")


async def _ends(process: rundir.Process, limit_ms: int) -> bool:
    """Wait for the end of a process. False: it is there after *limit_ms* still."""
    deadline = time.monotonic() + limit_ms / 1000
    while process.alive:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def end_without_heartbeat(daemon: "Daemon", reason: str) -> None:
    """The heartbeat process died: do what it would have done if it had outlived the daemon, then end as in a crash."""
    daemon.ending = True
    daemon.serving = False  # what would fail while the lower mount goes down is sent again to the next home
    try:
        if daemon.home is not None:
            await asyncio.to_thread(_shut_lower, daemon, daemon.home.lower.mount_fd)
        await asyncio.to_thread(_say_restarting, daemon)
    except (MxfsError, OSError) as exc:
        log.error("ended without a last word", reason=str(exc))
    daemon.fail(reason)


def _shut_lower(daemon: "Daemon", mount_fd: int) -> None:
    guard = LowerGuard()
    guard.arm(os.dup(mount_fd))
    left_ms = daemon._home_lease_until_ms() - daemon.timeouts.fence_margin_ms - now_ms()
    guard.flush_and_fence(left_ms / 1000)
    if guard.flushed:
        # As the heartbeat process would have: it is the one that the FUSE layer knows.
        shutil.copyfile(daemon.run_dir / rundir.HEARTBEAT, daemon.run_dir / rundir.FLUSHED)


def _say_restarting(daemon: "Daemon") -> None:
    assert daemon.held is not None and daemon.heartbeat is not None
    until_ms = daemon.heartbeat.last_report_ms + daemon.timeouts.lease_ms
    if now_ms() < until_ms:  # later the slot may be another's, whose claim this would cover
        daemon.lockspace.release_slot(daemon.held.record, SlotState.RESTARTING)


def check_slot(daemon: "Daemon") -> None:
    """The locks of a FUSE layer are those of a slot: they cannot go on in another one. Raises Refusal.

    That nobody took the slot meanwhile, `still_a_member` has seen before it was claimed.
    """
    assert daemon.fuse is not None
    before = daemon.fuse.slot
    if daemon.fuse.continues and before != daemon.slot:
        raise Refusal(f"this node's slot {before} was given to another node: unmount, and mount again")


def still_a_member(daemon: "Daemon") -> None:
    """Whoever puts a node out takes its slot: what a FUSE layer holds since before is void then. Raises Refusal.

    To be called before the slot is claimed anew. A later home, which does not know who was put out, relies on it.
    """
    assert daemon.fuse is not None
    if not daemon.fuse.continues:
        return
    found = daemon.lockspace.read_slots()[daemon.fuse.slot - 1]
    ours = found is not None and found.node_uuid == daemon.identity.node.bytes and found.state not in ENDED
    if not ours:
        raise Refusal(f"this node was put out of the volume (slot {daemon.fuse.slot}): unmount, and mount again")


def command(daemon: "Daemon") -> list[str]:
    """Return the command line that the FUSE layer starts the next daemon with; empty where systemd does that."""
    if daemon.supervised:
        return []
    words = [sys.executable, "-P", "-m", "mxfsd.cli.mxfsd", "--device", daemon.device]
    words += ["--mountpoint", daemon.mountpoint, "--options", daemon.options.to_string()]
    return [*words, "--run-dir", str(daemon.run_dir)]


def patiently(work: Callable[[], T], limit_ms: int) -> T:
    """Run *work*, which mounts, again while the kernel has not let go of the mount of the daemon before (EBUSY)."""
    deadline = time.monotonic() + limit_ms / 1000
    while True:
        try:
            return work()
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


async def bury(daemon: "Daemon", reason: str) -> None:
    """The FUSE layer died: nothing serves this mount any more. Unmount it, and leave when it shows nothing old."""
    log.error("the FUSE layer died: its mount is dead; mount again", reason=reason, mountpoint=daemon.mountpoint)
    await asyncio.to_thread(clear_dead_mount, daemon.mountpoint, daemon.device)
    # Others may change what the kernel has cached here as soon as this node has left.
    await asyncio.sleep(daemon.timeouts.kernel_cache_ms / 1000)
    daemon.stop(reason)


def clear_dead_mount(mountpoint: str, device: str) -> bool:
    """Unmount, lazily, a mount of *device* whose FUSE process has ended. Returns whether there was one."""
    mount = mountinfo.at(mountpoint)
    if mount is None or not mountinfo.is_mxfs(mount) or mount.source != device:
        return False
    subprocess.run(
        ["umount", "-i", "-l", mountpoint],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_UMOUNT_S,
    )
    return True
