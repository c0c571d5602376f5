"""Shipped operations on ranges of a file at the home (fallocate, seeking holes, copying), ioctl, and birth times.

What changes data here is durable before it is answered, like a stable WRITE: the node keeps nothing that it could write
again. Each may be repeated by the next home where it was begun and has no outcome (mxfsd/core/outcomes.py): of COPY the
source is made durable first, and nobody can have changed it since.
"""

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mxfs_proto.ioctls import FITRIM, SETS, check
from mxfs_proto.modes import LockMode
from mxfs_proto.ops import Fid, Op
from mxfsd.io import ranges
from mxfsd.io.ioctls import run

if TYPE_CHECKING:
    from mxfsd.home import HomeService, _Context

_SEEKS = (os.SEEK_DATA, os.SEEK_HOLE)


class RangeOps:
    """Executes them over the lower mount of *service*."""

    def __init__(self, service: "HomeService") -> None:
        self._service = service

    def handlers(self) -> dict[Op, Callable[..., Any]]:
        """Return what executes each operation."""
        return {
            Op.FALLOCATE: self._fallocate,
            Op.LSEEK: self._lseek,
            Op.COPY: self._copy,
            Op.IOCTL: self._ioctl,
            Op.BTIME: self._btime,
        }

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def _fallocate(
        self, c: "_Context", ino: int, gen: int, mode: int, offset: int, length: int, kill: int
    ) -> list[Any]:
        service = self._service
        fid = Fid(ino, gen)
        ranges.check_mode(mode)
        await c.lock((ino, LockMode.EX))
        await service.commit_before(ino, c.node)
        service.begin(c)
        if mode & ranges.ERASES:
            await service.intent_durable(c)
        await self._in_thread(lambda: service.lower.fallocate(fid, mode, offset, length, kill))
        await service.commit_stable(c, fid)
        return service.end(c, [], fid)

    async def _lseek(self, c: "_Context", ino: int, gen: int, offset: int, whence: int) -> list[Any]:
        service = self._service
        if whence not in _SEEKS:
            raise OSError(errno.EINVAL, f"lseek whence {whence}")
        await c.lock((ino, LockMode.CR))
        await service.commit_before(ino, c.node)
        service.saw(c, Fid(ino, gen))
        return [service.lower.seek(Fid(ino, gen), offset, whence)]

    async def _copy(
        self, c: "_Context", ino: int, gen: int, offset: int, to_ino: int, to_gen: int, to_offset: int, length: int,
        kill: int,
    ) -> list[Any]:  # fmt: skip
        service = self._service
        source, target = Fid(ino, gen), Fid(to_ino, to_gen)
        await c.lock((to_ino, LockMode.EX), *([(ino, LockMode.PR)] if ino != to_ino else []))
        await service.commit_before(ino, 0)  # whoever wrote it
        await service.commit_before(to_ino, c.node)
        service.begin(c)
        await service.intent_durable(c)
        service.saw(c, source)
        done = await self._in_thread(lambda: service.lower.copy(source, offset, target, to_offset, length, kill))
        await service.commit_stable(c, target)
        return service.end(c, [done], target)

    async def _ioctl(self, c: "_Context", ino: int, gen: int, command: int, given: bytes) -> list[Any]:
        service = self._service
        fid = Fid(ino, gen)
        check(command, given)
        if command == FITRIM:
            c.executed = True
            return [await self._in_thread(lambda: run(service.lower.mount_fd, command, given))]
        if command not in SETS:
            await c.lock((ino, LockMode.CR))
            return [service.lower.ioctl(fid, command, given)]
        await c.lock((ino, LockMode.EX))
        service.begin(c)
        return service.end(c, [service.lower.ioctl(fid, command, given)], fid)

    async def _btime(self, c: "_Context", ino: int, gen: int) -> list[Any]:
        c.seen.append(ino)
        return [self._service.lower.btime_ns(Fid(ino, gen))]
