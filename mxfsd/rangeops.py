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
from mxfsd.io import libc, ranges
from mxfsd.io.ioctls import run
from mxfsd.io.lower import kill_priv

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
        fd = service.lower.open(fid, os.O_RDWR)
        try:
            service.begin(c)
            if mode & ranges.ERASES:
                await self._told(c)
            await self._in_thread(lambda: libc.fallocate(fd, mode, offset, length))
            if kill:
                kill_priv(fd)
        finally:
            os.close(fd)
        await service.commit_stable(c, fid)
        return service.end(c, [], fid)

    async def _told(self, c: "_Context") -> None:
        """Data of a file is about to be overwritten, and may reach the disk before the log does: first make the intent
        durable, so that the next home knows that this was begun."""
        if c.intent is not None:
            await self._service.forced(self._service.forcer.changed(c.intent.fid))

    async def _lseek(self, c: "_Context", ino: int, gen: int, offset: int, whence: int) -> list[Any]:
        service = self._service
        if whence not in _SEEKS:
            raise OSError(errno.EINVAL, f"lseek whence {whence}")
        await c.lock((ino, LockMode.CR))
        await service.commit_before(ino, c.node)
        fd = service.lower.open(Fid(ino, gen), os.O_RDONLY)
        try:
            return [os.lseek(fd, offset, whence)]
        finally:
            os.close(fd)

    async def _copy(
        self, c: "_Context", ino: int, gen: int, offset: int, to_ino: int, to_gen: int, to_offset: int, length: int,
        kill: int,
    ) -> list[Any]:  # fmt: skip
        service = self._service
        source, target = Fid(ino, gen), Fid(to_ino, to_gen)
        await c.lock((to_ino, LockMode.EX), *([(ino, LockMode.PR)] if ino != to_ino else []))
        await service.commit_before(ino, 0)  # whoever wrote it
        await service.commit_before(to_ino, c.node)
        fd = service.lower.open(source, os.O_RDONLY)
        try:
            to_fd = service.lower.open(target, os.O_RDWR)
            try:
                service.begin(c)
                await self._told(c)
                done = await self._in_thread(lambda: ranges.copy(fd, offset, to_fd, to_offset, length))
                if kill:
                    kill_priv(to_fd)
            finally:
                os.close(to_fd)
        finally:
            os.close(fd)
        await service.commit_stable(c, target)
        return service.end(c, [done], target)

    async def _ioctl(self, c: "_Context", ino: int, gen: int, command: int, given: bytes) -> list[Any]:
        service = self._service
        fid = Fid(ino, gen)
        check(command, given)
        if command == FITRIM:
            c.executed = True
            return [await self._in_thread(lambda: run(service.lower.mount_fd, command, given))]
        await c.lock((ino, LockMode.EX if command in SETS else LockMode.CR))
        fd = service.lower.open(fid, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if command not in SETS:
                return [run(fd, command, given)]
            service.begin(c)
            return service.end(c, [run(fd, command, given)], fid)
        finally:
            os.close(fd)

    async def _btime(self, c: "_Context", ino: int, gen: int) -> list[Any]:
        c.seen.append(ino)
        return [self._service.lower.btime_ns(Fid(ino, gen))]
