"""The lab's shared disk: an image file, a loop device of its own for each node, and the final check."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mxfs_proto.errors import IoFailure, MisuseError
from mxfsd import procs, xfsprogs

DETACH_S = 15.0
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DIRTY_LOG = "valuable metadata changes in a log"  # xfs_repair's own words, phase 2


def parse_size(text: str) -> int:
    """Return the bytes of ``2G``, ``512M``, ``300m`` or ``1073741824``. Raises MisuseError."""
    upper = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = upper[-1:] if upper[-1:] in "KMGT" else ""
    digits = upper.removesuffix(unit) if unit else upper
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise MisuseError(f"{text}: not a size; write it as 512M or 2G")
    return int(digits) * _UNITS[unit]


def make_image(path: Path, size: int) -> None:
    """Make a sparse file of *size* bytes that nobody but root reads. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def attach(image: Path, *, read_only: bool = False) -> str:
    """Return a new loop device over the image.

    With direct I/O each node has caches of its own, as on a shared disk. On a file system that has no direct I/O all
    loop devices share one page cache, which is coherent too.
    """
    words = ["losetup", "--find", "--show"]
    if read_only:
        words.append("--read-only")
    try:
        return _run([*words, "--direct-io=on", str(image)]).strip()
    except IoFailure:
        return _run([*words, str(image)]).strip()


def backing(loop: str) -> str:
    """Return the path of the file behind a loop device; empty when it is free (or autoclears no more)."""
    try:
        return Path(f"/sys/block/{Path(loop).name}/loop/backing_file").read_text("utf-8", "surrogateescape").strip()
    except OSError:
        return ""


def loops_of(image: Path) -> list[str]:
    """Return the loop devices over the image."""
    return _run(["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)]).split()


def detach(loop: str, image: Path) -> None:
    """Free the loop device and wait until it is: it stays while anything, say a crashed mount, still has it open."""
    if backing(loop) != str(image):
        return
    subprocess.run(["losetup", "--detach", loop], capture_output=True, check=False)
    if not procs.wait_until(lambda: backing(loop) != str(image), DETACH_S):
        raise IoFailure(f"{loop} is still in use {DETACH_S:g} s after everything that we know of ended")


def check(image: Path) -> str:
    """Run xfs_repair -n over the volume; return the empty string if it is clean, else what it said.

    xfs_repair ignores a log that was not replayed (after a crash of every node) and then complains of what the log
    would have mended; so the log is replayed first by mounting the XFS once, as the next home would.
    """
    found = _repair(image)
    if _DIRTY_LOG in found:
        _replay(image)
        found = _repair(image)
    return found


def _repair(image: Path) -> str:
    loop = attach(image, read_only=True)
    try:
        done = xfsprogs.run("xfs_repair", "-n", loop)
    finally:
        detach(loop, image)
    output = done.stdout + done.stderr
    return output if done.returncode != 0 or _DIRTY_LOG in output else ""


def _replay(image: Path) -> None:
    loop = attach(image)
    folder = tempfile.mkdtemp(prefix="replay-", dir=image.parent)
    try:
        _run(["mount", "-i", "-t", "xfs", loop, folder])
        _run(["umount", "-i", folder])
    finally:
        with suppress(OSError):
            os.rmdir(folder)
        detach(loop, image)


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise IoFailure(f"{' '.join(argv)}: {reason}")
    return done.stdout
