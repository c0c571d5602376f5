"""``mkfs.mxfs``: XFS on all but the tail of a device, the lockspace in the tail."""

import argparse
import re
import sys

from mxfs_proto.errors import IoFailure, MediaError, MisuseError, MxfsError
from mxfs_proto.ondisk import (
    DEFAULT_LOCKSPACE_BYTES,
    LABEL_BYTES,
    MAX_LOCKSPACE_BYTES,
    MIN_LOCKSPACE_BYTES,
    RECORD_BYTES,
    HeaderRecord,
    format_uuid,
)
from mxfs_proto.xfs_sb import XfsSuper
from mxfsd import xfsprogs
from mxfsd.cli.device import WRITABLE, check_device, explain, kinds
from mxfsd.cli.oneline import OneLineParser
from mxfsd.core.watch import Watch
from mxfsd.info import MAX_WATCH_MS, watch_slots
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import Lockspace, format_lockspace, new_header, read_header

XFS_MIN_BYTES = 300 << 20
"""mkfs.xfs(8) refuses smaller file systems."""
_MIB = 1 << 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Refusal(MxfsError):
    """Why the device is not formatted, and what to do about it. Nothing was changed."""


def parse_size(text: str) -> int:
    """Return the bytes of ``16M``, ``1g``, ``16777216``. Raises MisuseError."""
    match = re.fullmatch(r"([0-9]{1,18})([kmg]?)(?:i?b)?", text.lower())
    if match is None:
        raise MisuseError(f"not a size: {text!r} (use bytes or a suffix K, M, G)")
    return int(match[1]) * _UNITS[match[2]]


def parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before ``--``."""
    made = OneLineParser(
        prog="mkfs.mxfs", description="Make an MXFS volume.", usage="%(prog)s DEVICE [-f] [-L label] "
        "[--lockspace-size SIZE] [-- mkfs.xfs options]"
    )  # fmt: skip
    made.add_argument("device", help="shared block device")
    made.add_argument("-f", "--force", action="store_true", help="overwrite what is on the device")
    made.add_argument("-L", "--label", default="", help=f"label, at most {LABEL_BYTES} bytes")
    made.add_argument("--lockspace-size", default=str(DEFAULT_LOCKSPACE_BYTES), help="default 16M")
    return made


def parse_arguments(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and what follows ``--``."""
    extra: list[str] = []
    if "--" in args:
        at = args.index("--")
        args, extra = args[:at], args[at + 1 :]
    return parser().parse_args(args), extra


def check_options(options: argparse.Namespace, extra: list[str]) -> int:
    """Return the lockspace size in bytes. Raises Refusal."""
    if len(options.label.encode()) > LABEL_BYTES:
        raise Refusal(f"label {options.label!r} is longer than {LABEL_BYTES} bytes: choose a shorter one")
    size = parse_size(options.lockspace_size)
    if size % RECORD_BYTES or not MIN_LOCKSPACE_BYTES <= size <= MAX_LOCKSPACE_BYTES:
        raise Refusal(f"lockspace size {size}: use 1M to 1G, a multiple of {RECORD_BYTES}")
    text = " ".join(extra)
    if any(word.startswith("-") and not word.startswith("--") and "N" in word for word in extra):
        raise Refusal("the mkfs.xfs option -N (do not write) makes no volume: leave it out")
    if "logdev=" in text or "rtdev=" in text:
        raise Refusal("external log and realtime devices are not supported: leave logdev= and rtdev= out")
    return size


def check_nobody_uses(device: str) -> None:
    """Look whether a node beats in the lockspace that is there now, if any. Raises Refusal."""
    try:
        lockspace = Lockspace.open(device, readonly=True, check_xfs=False)
    except MediaError:
        return
    try:
        watch = Watch(MAX_WATCH_MS)
        watch_slots(lockspace, watch)
        for slot in lockspace.snapshot().slots:
            if slot is not None and watch.beats(slot.slot):
                raise Refusal(f"{device} is in use by node {slot.name!r} (slot {slot.slot}): unmount it there first")
    finally:
        lockspace.close()


def check_contents(device: str, force: bool) -> None:
    """Refuse to overwrite a file system, a partition table or anything that blkid knows. Raises Refusal, NoBlkid."""
    kind = "" if force else " and ".join(kinds(device))
    if kind:
        raise Refusal(f"{device} holds {kind}: use -f to overwrite it")


def mkfs_xfs(device: str, size: int, label: str, extra: list[str], *, dry_run: bool) -> None:
    """Run mkfs.xfs(8) on the first *size* bytes. Raises Refusal (dry run) or IoFailure with its first line."""
    options = ["-f", "-q", *(["-N"] if dry_run else []), *(["-L", label] if label else [])]
    try:
        done = xfsprogs.run("mkfs.xfs", *options, "-d", f"size={size}", *extra, device)
    except OSError as error:
        tool = xfsprogs.program("mkfs.xfs")
        raise Refusal(f"cannot run {tool}: {error.strerror}: install xfsprogs") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = lines[0].strip() if lines else f"exit code {done.returncode}"
        if dry_run:
            raise Refusal(f"mkfs.xfs would fail: {reason}: check the options after --")
        raise IoFailure(f"mkfs.xfs failed: {reason}")


def wipe_headers(disk: Disk) -> None:
    """Make an old lockspace unusable before XFS is written, so that a half-made volume is never mounted."""
    zeros = bytes(RECORD_BYTES)
    try:
        offset = read_header(disk).lockspace_offset
    except MediaError:
        return
    disk.write(disk.size - disk.size % RECORD_BYTES - RECORD_BYTES, zeros)
    disk.write(offset, zeros)
    disk.sync()


def make_volume(device: str, options: argparse.Namespace, extra: list[str]) -> HeaderRecord:
    """Check everything, then format. Raises MxfsError; a Refusal means that nothing was changed."""
    lockspace_bytes = check_options(options, extra)
    check_device(device, "format", WRITABLE)
    check_nobody_uses(device)
    with Disk(device, exclusive=True) as disk:
        end = disk.size - disk.size % RECORD_BYTES
        offset = end - lockspace_bytes
        xfs_bytes = offset - offset % _MIB
        if xfs_bytes < XFS_MIN_BYTES:
            least = (XFS_MIN_BYTES + lockspace_bytes) // _MIB
            raise Refusal(f"{device} is too small ({disk.size} bytes): at least {least} MiB are needed")
        check_contents(device, options.force)
    mkfs_xfs(device, xfs_bytes, options.label, extra, dry_run=True)
    try:
        return write_volume(device, options.label, extra, xfs_bytes, lockspace_bytes)
    except MxfsError as error:
        raise IoFailure(f"{explain(device, error)}; the device holds no usable volume now") from error


def write_volume(device: str, label: str, extra: list[str], xfs_bytes: int, lockspace_bytes: int) -> HeaderRecord:
    """Format: from here on the old contents are gone. Raises MxfsError."""
    with Disk(device, exclusive=True) as disk:
        wipe_headers(disk)
    mkfs_xfs(device, xfs_bytes, label, extra, dry_run=False)
    with Disk(device, exclusive=True) as disk:
        offset = disk.size - disk.size % RECORD_BYTES - lockspace_bytes
        xfs = XfsSuper.decode(disk.read(0, RECORD_BYTES))
        if not XFS_MIN_BYTES <= xfs.size <= offset:
            raise IoFailure(f"mkfs.xfs made a file system of {xfs.size} bytes instead of {xfs_bytes}")
        header = new_header(disk, xfs, lockspace_bytes)
        format_lockspace(disk, header)
    return header


def main(args: list[str] | None = None) -> int:
    """Run mkfs.mxfs; return the exit code: 0, or 1 with one line on stderr."""
    options, extra = parse_arguments(sys.argv[1:] if args is None else args)
    try:
        header = make_volume(options.device, options, extra)
    except MxfsError as error:
        print(f"mkfs.mxfs: {explain(options.device, error)}", file=sys.stderr)
        return 1
    print(
        f"{options.device}: MXFS volume {format_uuid(header.volume)}"
        f"{f' ({header.label})' if header.label else ''}, XFS {header.xfs_bytes >> 20} MiB, "
        f"lockspace {header.lockspace_bytes >> 20} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
