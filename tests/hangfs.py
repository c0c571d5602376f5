"""A disk that can stop to answer: files served by a FUSE server of its own, which is stopped (SIGSTOP) and continued.

Run as a program it is that server: ``hangfs.py SOURCE MOUNTPOINT`` shows the files of the folder SOURCE, uncached.
"""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HangingDisk:
    """The files of one folder at ``folder``, for the length of a ``hanging_disk`` block."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self._server = server

    def hang(self) -> None:
        """From now on no I/O ends."""
        self._server.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Every I/O ends again."""
        self._server.send_signal(signal.SIGCONT)


@contextmanager
def hanging_disk(source: Path, mountpoint: Path) -> Iterator[HangingDisk]:
    """Serve the files of *source* at *mountpoint*; they hang when told to. What hangs at the end gets EIO."""
    mountpoint.mkdir()
    command = [sys.executable, __file__, str(source), str(mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"ready\n"
            yield HangingDisk(mountpoint, server)
        finally:
            # With its server the connection ends, which ends every request that hangs.
            server.kill()
            server.wait()
            subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def _serve(source: str, mountpoint: str) -> None:
    import pyfuse3
    import pyfuse3.asyncio

    names = sorted(os.listdir(source))
    files = [os.open(os.path.join(source, name), os.O_RDWR) for name in names]

    class Server(pyfuse3.Operations):  # type: ignore[misc]
        async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_nlink = 1
            entry.attr_timeout = entry.entry_timeout = 1000
            if inode == pyfuse3.ROOT_INODE:
                entry.st_mode = stat.S_IFDIR | 0o755
            else:
                entry.st_mode = stat.S_IFREG | 0o600
                entry.st_size = os.fstat(files[inode - 2]).st_size
            return entry

        async def lookup(self, _parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
            if os.fsdecode(name) not in names:
                raise pyfuse3.FUSEError(2)
            return await self.getattr(names.index(os.fsdecode(name)) + 2)

        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=inode, direct_io=True)

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            return os.pread(files[fh - 2], size, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            return os.pwrite(files[fh - 2], data, offset)

        async def fsync(self, fh: int, datasync: bool) -> None: ...

        async def flush(self, fh: int) -> None: ...

        async def release(self, fh: int) -> None: ...

    pyfuse3.asyncio.enable()
    pyfuse3.init(Server(), mountpoint, {"fsname=hangfs"})
    print("ready", flush=True)
    asyncio.run(pyfuse3.main())


if __name__ == "__main__":
    _serve(*sys.argv[1:])
