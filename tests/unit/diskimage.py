"""Images with a lockspace for tests: a file with the first sector of an XFS and nothing else of it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mxfs_proto.ondisk import HeaderRecord
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import Lockspace, format_lockspace

VOLUME = bytes(range(16))
KEY = bytes(range(32))
LOCKSPACE = 1 << 20
OFFSET = 4 << 20
SIZE = OFFSET + LOCKSPACE


def xfs_sector(uuid: bytes = VOLUME, size: int = OFFSET, label: bytes = b"data") -> bytes:
    """Return a first sector that looks like XFS."""
    data = bytearray(4096)
    data[0:4] = b"XFSB"
    data[4:8] = (4096).to_bytes(4, "big")
    data[8:16] = (size // 4096).to_bytes(8, "big")
    data[32:48] = uuid
    data[108 : 108 + len(label)] = label
    return bytes(data)


def make_image(path: Path) -> Path:
    """Make an image with an empty lockspace of 1 MiB."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.write(xfs_sector())
    with Disk(str(path)) as disk:
        format_lockspace(disk, HeaderRecord(VOLUME, KEY, "data", SIZE, OFFSET, LOCKSPACE, OFFSET, 1_700_000_000))
    return path


class FakeClock:
    """Milliseconds that pass only in ``sleep``; *on_sleep* is called each time, as another node would act."""

    def __init__(self) -> None:
        self.ms = 1000
        self.on_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> int:
        """Return the time."""
        return self.ms

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.ms += round(seconds * 1000)
        self.on_sleep()


def open_lockspace(path: Path | str, clock: FakeClock) -> Lockspace:
    """Open an image on a clock of its own; the caller closes it."""
    return Lockspace(Disk(str(path)), clock=clock, sleep=clock.sleep)


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[str]:
    """Attach *image* to a loop device for the length of a with block."""
    command = ["losetup", "--find", "--show", *options, str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        if "--read-only" not in options:  # the device outlives what was attached to it, and so would such a mark
            subprocess.run(["blockdev", "--setrw", device], check=True)
        subprocess.run(["losetup", "--detach", device], check=True)


@dataclass
class LoopDisk:
    """A disk that can change its size: an image, and the loop device over it."""

    image: Path
    device: str

    def resize(self, size: int) -> None:
        """Make it *size* bytes long, and have this host notice."""
        os.truncate(self.image, size)
        subprocess.run(["losetup", "--set-capacity", self.device], check=True)
