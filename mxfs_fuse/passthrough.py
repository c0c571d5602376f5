"""Files that the kernel reads and writes by itself on a home: FUSE passthrough (docs/architecture.md, "Passthrough").

The kernel asks nobody about such a file, so an open of it is a lock that cannot be called back. It refuses (EIO, after
the answer) what mixes such opens with others, or two backing ids of one inode. So the first open of an inode decides
for all that come until the last one is closed, and they share a backing id.

A **free** open is read and written by the kernel. A **direct** one is mapped by the kernel only, its reads and writes
are upcalls: so an open for writing goes that other nodes do not let this one cache.

While the kernel may write a file it is **pinned**: counted as one more open for writing, and the master lets no other
node cache it. A mapping outlives the last close, and nothing tells when it goes: the pin ends when the kernel grants a
read lease on the lower file (F_SETLEASE, fcntl(2)), which it refuses while anybody has that open for writing or maps it
so.
"""

import asyncio
import errno
import fcntl
import functools
import os
from collections.abc import Callable
from typing import Protocol

import structlog

from mxfs_fuse.nodes import Handle, Node
from mxfs_fuse.state import State

log = structlog.get_logger(__name__)

_SOON_S = 0.02


class Backing(Protocol):
    """The channel's part. Raises OSError."""

    def open_backing(self, fd: int) -> int:
        """Return a backing id for the file open at *fd*."""

    def close_backing(self, backing_id: int) -> None:
        """Give a backing id back."""


class PassthroughFile:
    """An inode of which all opens are such ones."""

    __slots__ = ("alone", "backing_id", "ending", "handles", "node", "stale", "writers")

    def __init__(self, node: Node, backing_id: int) -> None:
        self.node = node
        self.backing_id = backing_id
        self.handles = 0
        self.writers = 0
        """Of these, those through which the kernel may write: free ones for writing, direct ones that can be mapped."""
        self.alone = False
        """It was pinned when no other node had it open. No other node caches it then, until the pin ends."""
        self.ending = False
        """Nobody writes it any more; what was written is being made durable."""
        self.stale = False
        """The lower mount that it is on has ended: the kernel answers EIO until the last open is closed."""


def may_write_mapped(flags: int) -> bool:
    """Whether a descriptor opened with these flags can be mapped for writing (mmap(2): that wants to be read too)."""
    return flags & os.O_ACCMODE == os.O_RDWR


def leases_enabled() -> bool:
    """Whether this host grants leases on files at all (proc_sys_fs(5)): without them no pin would ever end."""
    try:
        with open("/proc/sys/fs/leases-enable", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def writers_gone(fd: int) -> bool:
    """Whether nobody has the file open for writing, or maps it so; *fd*: a read-only descriptor of it."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as exc:
        if exc.errno != errno.EAGAIN:
            log.error("it cannot be known who writes a file: leases are refused", reason=str(exc))
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


class Passthrough:
    """The table of these inodes. *closed* is told when an open that was counted has gone."""

    def __init__(
        self, state: State, closed: Callable[[Node], None], gone: Callable[[int], bool] = writers_gone
    ) -> None:
        self._state = state
        self._closed = closed
        self._gone = gone
        self._files: dict[int, PassthroughFile] = {}
        self.backing: Backing | None = None
        """Where backing ids come from; None: no open becomes such a one."""
        self._ended = asyncio.Event()
        """Set when the lower mount ends, and made anew then."""

    # -- opening ---------------------------------------------------------------------------------------------------

    def choose(self, node: Node, cached: bool) -> PassthroughFile | None:
        """Decide how an open goes that is counted already and that other nodes let us cache or not.

        None: as an ordinary one. Raises OSError: EIO where the opens of before have lost their lower mount.
        """
        file = self._files.get(node.fid.ino)
        if file is not None:
            if file.stale or file.node is not node:
                raise OSError(errno.EIO, "it was open when the lower mount ended, and is not closed yet")
            return file
        lower = self._state.lower
        if self.backing is None or lower is None or not cached or node.opens_r + node.opens_w != 1:
            return None
        # Read-only: the kernel keeps this open file with the id, and it would look like a writer.
        fd = lower.open(node.fid, os.O_RDONLY)
        try:
            backing_id = self.backing.open_backing(fd)
        except OSError as exc:
            log.warning("a file is not opened for passthrough", ino=node.fid.ino, reason=str(exc))
            return None
        finally:
            os.close(fd)
        file = self._files[node.fid.ino] = PassthroughFile(node, backing_id)
        return file

    @staticmethod
    def is_free(file: PassthroughFile, writable: bool, cached: bool) -> bool:
        """Whether the kernel may read and write through an open. What was not granted may be written all the same where
        the kernel writes the file already: other nodes do not cache it."""
        return not writable or cached or file.alone

    def opened(self, handle: Handle, file: PassthroughFile, free: bool) -> None:
        """An open was decided: it is one of *file*'s from now on."""
        handle.passthrough = file
        handle.free = free
        file.handles += 1
        if handle.writable and (free or may_write_mapped(handle.flags)):
            file.writers += 1
            self._pin(file, alone=free)

    def closed(self, handle: Handle) -> None:
        """It was released."""
        file = handle.passthrough
        assert file is not None
        file.handles -= 1
        if handle.writable and (handle.free or may_write_mapped(handle.flags)):
            file.writers -= 1
        self._look(file)

    # -- pins ------------------------------------------------------------------------------------------------------

    def _pin(self, file: PassthroughFile, alone: bool) -> None:
        file.alone = file.alone or alone
        node = file.node
        if node.pinned:
            return
        node.pinned = True
        node.opens_w += 1
        self._state.locks.tell_pin(node)
        if self._state.kernel is not None:
            # Nobody says when a mapping is written to: no attributes are kept from now on, and none from before.
            self._state.kernel.inval_attributes(self._state.nodeid_of(node.fid.ino))

    def _unpin(self, file: PassthroughFile) -> None:
        file.alone = False
        node = file.node
        node.pinned = False
        node.opens_w -= 1
        # What was written since the lock was released last: it is made durable before the next release.
        self._state.changed(node.fid.ino)

    def _look(self, file: PassthroughFile, *, again_soon: bool = True) -> None:
        """End what has ended."""
        node = file.node
        if node.pinned and not file.writers:
            if not self._writers_gone(node):
                if again_soon:
                    self._state.later(_SOON_S, self.tick)
            elif node.pin_told:
                self._state.spawn(self._made_durable(file))
            else:
                self._writers_ended(file)
        self._forget_unused(file)

    def _writers_ended(self, file: PassthroughFile) -> None:
        node = file.node
        self._unpin(file)
        self._state.locks.tell_pin(node)
        self._forget_unused(file)
        self._closed(node)

    async def _made_durable(self, file: PassthroughFile) -> None:
        """What was written while others could see it is durable before the master is told that nobody writes any more:
        until then it has that done itself. (Where it fails, tick() tries again.)"""
        lower = self._state.lower
        if file.ending or lower is None:
            return
        file.ending = True
        try:
            await self._state.in_lower(functools.partial(lower.sync, file.node.fid))
        except OSError as exc:
            log.warning("a file written by the kernel cannot be made durable", ino=file.node.fid.ino, reason=str(exc))
            return
        finally:
            file.ending = False
        # Nobody began to write again meanwhile: who opens it is counted at once.
        if file.node.pinned and not file.writers and not file.stale and self._writers_gone(file.node):
            self._writers_ended(file)

    def _writers_gone(self, node: Node) -> bool:
        lower = self._state.lower
        if lower is None:
            return False
        try:
            fd = lower.open(node.fid, os.O_RDONLY)
        except OSError as exc:
            return exc.errno == errno.ESTALE  # whoever has it open keeps it from going
        try:
            return self._gone(fd)
        finally:
            os.close(fd)

    def _forget_unused(self, file: PassthroughFile) -> None:
        if file.handles or file.node.pinned or self._files.get(file.node.fid.ino) is not file:
            return
        del self._files[file.node.fid.ino]
        self._give_back(file)

    def _give_back(self, file: PassthroughFile) -> None:
        if self.backing is None:
            return
        try:
            self.backing.close_backing(file.backing_id)
        except OSError as exc:
            log.warning("a backing id was not given back", ino=file.node.fid.ino, reason=str(exc))

    def tick(self) -> None:
        """Look for mappings that have gone. Called once a second, and soon after a close."""
        for file in [file for file in self._files.values() if not file.writers and file.node.pinned]:
            self._look(file, again_soon=False)

    # -- the lower mount -------------------------------------------------------------------------------------------

    def held(self) -> list[int]:
        """The inodes through which the kernel keeps the lower mount: it cannot be unmounted."""
        return [ino for ino, file in self._files.items() if not file.stale]

    def pinned(self) -> list[Node]:
        """The inodes that the kernel may write by itself."""
        return [file.node for file in self._files.values() if file.node.pinned]

    def lower_gone(self) -> list[int]:
        """The lower mount was shut down under these files. Returns the inodes that are still open."""
        found = []
        for ino, file in list(self._files.items()):
            if file.stale:
                continue
            file.stale = True
            if file.node.pinned:
                self._unpin(file)
            if file.handles:
                found.append(ino)
            self._forget_unused(file)
        self._ended.set()
        self._ended = asyncio.Event()
        return found

    async def pass_gate(self, file: PassthroughFile) -> None:
        """Wait as State.pass_gate() does, but no longer than until the file is known to be stale. Raises OSError."""
        while self._state.gate is not None and not file.stale:
            opened = asyncio.ensure_future(self._state.pass_gate())
            ended = asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait((opened, ended), return_when=asyncio.FIRST_COMPLETED)
                if opened.done():
                    opened.result()
            finally:
                opened.cancel()
                ended.cancel()

    def close(self) -> None:
        """The mount has ended: give every backing id back, for something else may keep /dev/fuse open."""
        for file in self._files.values():
            self._give_back(file)
        self._files.clear()
