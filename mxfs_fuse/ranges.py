"""What pyfuse3 has no requests for: fallocate, holes, copies within the volume, ioctl and birth times.

As everywhere, the home does it on its lower mount where its lock covers it; else the home's daemon does it.
"""

from typing import cast

from mxfs_fuse.nodes import Handle, Node
from mxfs_fuse.state import State
from mxfs_fuse.writes import ShippedWrites
from mxfs_proto.ioctls import FITRIM, SETS, check
from mxfs_proto.ops import Op
from mxfsd.io import ranges


class Ranges:
    """These operations. Raises OSError. *writes*: what is on its way to the home, or not durable there."""

    def __init__(self, state: State, writes: ShippedWrites) -> None:
        self._state = state
        self._writes = writes

    async def fallocate(self, handle: Handle, offset: int, length: int, mode: int) -> None:
        """fallocate(2)."""
        state, node = self._state, handle.node
        kill = int(not handle.privileged)
        ranges.check_mode(mode)
        if state.lower is not None and state.may_change(handle.ino):
            state.check_writable()
            state.lower.fallocate(node.fid, mode, offset, length, kill)
            state.changed(handle.ino)
            return
        await self._change(node, Op.FALLOCATE, (*node.fid, mode, offset, length, kill))

    async def lseek(self, handle: Handle, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        state, node = self._state, handle.node
        if state.lower is not None and state.may_read(handle.ino):
            return state.lower.seek(node.fid, offset, whence)
        await self._writes.settle(node)
        _, (found,) = await state.link.ship(Op.LSEEK, 0, 0, (*node.fid, offset, whence))
        return cast(int, found)

    async def copy(self, source: Handle, offset: int, target: Handle, to_offset: int, length: int) -> int:
        """copy_file_range(2). Returns the bytes copied, which may be fewer."""
        state = self._state
        values = (source.node.fid, offset, target.node.fid, to_offset, length, int(not target.privileged))
        if state.lower is not None and state.may_change(target.ino) and state.may_read(source.ino):
            state.check_writable()
            done = state.lower.copy(*values)
            state.changed(target.ino)
            return done
        await self._writes.settle(source.node)
        fid, start, to_fid, *rest = values
        return cast(int, await self._change(target.node, Op.COPY, (*fid, start, *to_fid, *rest)))

    async def ioctl(self, node: Node, command: int, given: bytes, uid: int) -> bytes:
        """ioctl(2); the kernel has checked who may set flags, not who may trim."""
        state = self._state
        check(command, given)
        if command == FITRIM and uid != 0:
            raise PermissionError(1, "only root may trim")
        if command in SETS:
            return cast(bytes, await self._change(node, Op.IOCTL, (*node.fid, command, given)))
        if state.lower is not None and state.may_read(node.fid.ino) and command != FITRIM:
            return state.lower.ioctl(node.fid, command, given)
        _, (result,) = await state.link.ship(Op.IOCTL, 0, 0, (*node.fid, command, given))
        return cast(bytes, result)

    async def btime_ns(self, node: Node) -> int:
        """When the object was made, in nanoseconds since the epoch."""
        state = self._state
        if state.lower is not None:
            return state.lower.btime_ns(node.fid)
        _, (when,) = await state.link.ship(Op.BTIME, 0, 0, node.fid)
        return cast(int, when)

    async def _change(self, node: Node, op: Op, values: tuple[object, ...]) -> object:
        """Have the home change an object; what was written to it before is durable first, as a replay would undo it."""
        state = self._state
        state.check_writable()
        await self._writes.before_change(node)
        state.own_change(node)
        try:
            _, result = await state.link.ship(op, 0, 0, values)
        finally:
            node.end_seq = -1
            state.own_change(node)
        return result[0] if result else None
