"""The lower mount goes away under a home's own FUSE layer: what was lost with it, and what may be done again.

When the daemon died the heartbeat process shuts the lower XFS down: with a flush while the lease is valid (then nothing
is lost), without one when there is no time left (then whatever was not made durable is lost, as in a power failure).
What has been written here and not made durable is `State.unsynced`; after a loss the next fsync or close of such a file
says EIO, once.

An operation that the shut-down XFS answered with EIO was not answered yet, so it may be done again through the next
home, if it is known not to have happened or does no harm twice:

* With the flush: XFS is frozen first, which waits for every operation under way and lets none begin until XFS is shut
  down; what begins then is refused before it changes anything (xfs_trans_alloc). So what failed did not happen.
* Without: a transaction that was answered EIO may be in the log or not. Only what may be repeated is.
"""

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

import structlog

from mxfs_fuse.nodes import Node
from mxfs_fuse.state import State, is_down
from mxfsd import rundir
from mxfsd.io.lower import Lower

log = structlog.get_logger(__name__)

REPEATABLE = frozenset(
    ("lookup", "getattr", "readlink", "statfs", "getxattr", "listxattr", "open", "opendir", "readdir", "read")
    + ("fsync", "fsyncdir", "setattr", "setxattr", "fallocate", "lseek", "copy_file_range", "ioctl", "btime")
)
"""Operations that may run twice. Not write: a descriptor with O_APPEND writes somewhere else the second time."""
_DOWN = frozenset({errno.EIO, errno.ESTALE})
"""What a lower mount that is shut down says: ESTALE where an inode cannot be read any more (open_by_handle_at(2))."""
_POLL_S = 0.01


async def may_be_redone(state: State, lower: Lower | None, code: int, operation: str) -> bool:
    """Whether an operation that began over *lower* and failed with *code* is to be done again.

    Returns when the next home serves. Raises OSError: EIO when there will be none, EINTR when the caller is dying.
    """
    if lower is None or code not in _DOWN:
        return False
    if state.lower is lower:
        if not is_down(lower):
            return False
        state.lower_is_down()
    await state.pass_gate()
    return state.kept_all or operation in REPEATABLE


class LowerEnd:
    """Leaves the lower mount of a home whose daemon is gone. *heartbeat*: the process that shuts it down."""

    def __init__(self, state: State, run_dir: Path, heartbeat: rundir.Process | None, limit_s: float) -> None:
        self._state = state
        self._run_dir = run_dir
        self._heartbeat = heartbeat
        self._limit_s = limit_s

    async def leave(self, pinned: Sequence[Node] = ()) -> None:
        """Close everything below, then note what was lost. The gate is closed: nothing new begins.

        *pinned*: what the kernel wrote by itself, behind a flush of ours too: only the other process's word is good.
        """
        state = self._state
        lower = state.lower
        if lower is None:
            return
        kept = await self._flush(lower)
        await state.leave_lower()
        word = (not kept or bool(pinned)) and await self._was_flushed()
        lost = state.lower_ended(kept or word)
        if not word:
            lost += len(pinned)
            for node in pinned:
                node.lose(errno.EIO)
        if lost:
            log.error("the lower mount ended without a flush: unsynced changes are lost", inodes=lost)

    async def _flush(self, lower: Lower) -> bool:
        """Make everything durable ourselves. False: it is shut down already, with a flush or without."""
        try:
            await self._state.in_lower(lower.syncfs)
        except OSError as exc:
            log.info("the lower mount is shut down already", reason=str(exc))
            return False
        return True

    async def _was_flushed(self) -> bool:
        """Whether the heartbeat process left word that everything was written back before the shutdown."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limit_s
        while self._heartbeat is not None and self._heartbeat.alive and loop.time() < deadline:
            if rundir.was_flushed(self._run_dir, self._heartbeat):
                return True
            await asyncio.sleep(_POLL_S)
        return self._heartbeat is not None and rundir.was_flushed(self._run_dir, self._heartbeat)
