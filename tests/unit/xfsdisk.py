"""A real XFS on a loop device, mounted detached, for tests of what runs on the lower mount."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diskimage

from mxfsd.io import libc
from mxfsd.io import lower as lower_module
from mxfsd.io.lower import Lower

_PR_GET_SECUREBITS, _PR_SET_SECUREBITS = 27, 28
IMAGE_BYTES = 320 << 20


@contextmanager
def xfs_device(folder: Path) -> Iterator[str]:
    """Make an XFS in a sparse file and attach it; a loop device's path."""
    image = folder / "xfs.img"
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, timeout=60)
    with diskimage.loop_device(image) as device:
        yield device
    image.unlink()


@contextmanager
def keep_process() -> Iterator[None]:
    """Undo what a Lower does to its process: the umask and the secure bits."""
    umask = os.umask(0o022)
    os.umask(umask)
    prctl = ctypes.CDLL(None).prctl
    bits = prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    try:
        yield
    finally:
        os.umask(umask)
        prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0)
        vars(lower_module._thread).clear()  # what it noted of this thread's bits


def mount(device: str, *, readonly: bool = False) -> Lower:
    """Mount the device as the home does; the caller closes it."""
    lower = Lower(libc.mount_detached(device, readonly))
    if not readonly:
        lower.prepare()
    return lower


def forget_operations(lower: Lower) -> None:
    """Remove what tests before left of shipped operations."""
    folder = os.open(b".mxfs/ops", os.O_RDONLY | os.O_DIRECTORY, dir_fd=lower.mount_fd)
    for name in os.listdir(folder):
        os.unlink(name, dir_fd=folder)
    os.close(folder)
