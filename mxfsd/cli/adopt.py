"""``mxfs adopt DEVICE [-f]``: an XFS whose device has room behind it becomes an MXFS volume, its files as they are."""

import argparse
import sys

from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import RECORD_BYTES, HeaderRecord, format_uuid
from mxfs_proto.xfs_sb import NotXfs, XfsSuper, has_quotas, obstacle
from mxfsd import xfsprogs
from mxfsd.adopt import CannotAdopt, adopt, plan, remains, unfinished
from mxfsd.cli.device import WRITABLE, check_device, explain, kinds
from mxfsd.cli.mkfs import check_nobody_uses
from mxfsd.cli.oneline import OneLineParser
from mxfsd.io.disk import Disk
from mxfsd.io.headers import end_of
from mxfsd.io.lower import HIDDEN

_GPT = b"EFI PART"
_SECTORS = (512, 4096)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mxfs adopt``."""
    made = OneLineParser(
        prog="mxfs adopt",
        description="Make an MXFS volume of an XFS, whose files stay. The device must be 16 MiB larger than the XFS, "
        "and no host may have it mounted.",
        epilog="The XFS is not written. It can still be mounted as plain XFS by one host where no node has the volume.",
    )
    made.add_argument("device", help="block device with an XFS, enlarged by 16 MiB or more")
    made.add_argument(
        "-f", "--force", action="store_true", help="overwrite what is behind the XFS; do without its quotas"
    )
    return made


def check_behind(disk: Disk, header: HeaderRecord, xfs_bytes: int, force: bool) -> None:
    """Refuse to overwrite a partition table, a RAID member or another lockspace. Raises CannotAdopt."""
    found = remains(disk, header, xfs_bytes)
    if not found:
        tail = disk.read(end_of(disk) - RECORD_BYTES, RECORD_BYTES)
        start = -(-xfs_bytes // RECORD_BYTES) * RECORD_BYTES
        if any(tail.startswith(_GPT, len(tail) - size) for size in _SECTORS):
            found = "the copy of a partition table (GPT)"
        else:
            # What stands at the end may say where it is on the whole device.
            whole = [kind for kind in kinds(disk.path) if kind != "xfs"]
            found = " and ".join(whole or kinds(disk.path, "-O", str(start), "-S", str(disk.size - start)))
    if found and not force:
        raise CannotAdopt(f"{disk.path} has something behind the XFS ({found}): use -f to overwrite it")


def _ask(tool: str, *arguments: str) -> str:
    """Return what a program of xfsprogs says. Raises CannotAdopt."""
    try:
        done = xfsprogs.run(tool, *arguments)
    except OSError as error:
        raise CannotAdopt(f"cannot run {tool}: {error.strerror}: install xfsprogs") from None
    return done.stdout + done.stderr


def check_log(device: str) -> None:
    """Refuse an XFS that was not unmounted, or is mounted on another host. Raises CannotAdopt."""
    said = _ask("xfs_logprint", "-t", device)
    if "<CLEAN>" in said:
        return
    if "<DIRTY>" in said:
        raise CannotAdopt(
            f"{device}: the log of the XFS is not clean: unmount it on every host; if none has it mounted, mount and "
            "unmount it once (mount -t xfs)"
        )
    raise CannotAdopt(f"{device}: xfs_logprint cannot read the log ({_line(said)}): see xfs_repair -n {device}")


def check_hidden(device: str) -> None:
    """Refuse an XFS with a folder, or anything else, where MXFS would make its own. Raises CannotAdopt."""
    name = HIDDEN.decode()
    said = _ask("xfs_db", "-r", "-c", f"path /{name}", "-c", "print core.mode", device)
    if "No such file" in said:
        return
    if "core.mode = " in said:
        raise CannotAdopt(
            f"{device}: the XFS has a {name}, a name that MXFS keeps for itself: mount it (mount -t xfs), remove that, "
            "unmount it"
        )
    raise CannotAdopt(f"{device}: xfs_db cannot look for {name} ({_line(said)}): see xfs_repair -n {device}")


def _line(said: str) -> str:
    return next((line.strip() for line in said.splitlines() if line.strip()), "it says nothing")


def make_volume(device: str, force: bool) -> tuple[HeaderRecord, int]:
    """Check everything, then write. Return the header, and the bytes of the XFS now. Raises MxfsError."""
    check_device(device, "adopt", WRITABLE)
    with Disk(device, exclusive=True) as disk:
        first = disk.read(0, RECORD_BYTES)
        try:
            xfs = XfsSuper.decode(first)
        except NotXfs:
            held = " and ".join(kinds(device)) or "no file system"
            raise CannotAdopt(f"{device} holds {held}, no XFS: mkfs.mxfs makes a new volume") from None
        header = unfinished(disk)
        if header is None:
            header = _check(disk, xfs, first, force)
            adopt(disk, header, finish=False)
        else:
            adopt(disk, header, finish=True)
    return header, xfs.size


def _check(disk: Disk, xfs: XfsSuper, first: bytes, force: bool) -> HeaderRecord:
    """Return the header to be. Raises CannotAdopt."""
    device = disk.path
    reason = obstacle(first)
    if reason:
        raise CannotAdopt(f"{device} holds {reason}")
    header = plan(disk, xfs)
    check_behind(disk, header, xfs.size, force)
    if has_quotas(first) and not force:
        raise CannotAdopt(f"{device}: the XFS has quotas, which MXFS does not enforce: use -f to do without")
    check_nobody_uses(device)
    check_log(device)
    check_hidden(device)
    return header


def render(device: str, header: HeaderRecord, xfs_bytes: int) -> str:
    """Return what to say of it."""
    now, then = xfs_bytes >> 20, header.xfs_bytes >> 20
    text = (
        f"{device}: MXFS volume {format_uuid(header.volume)}{f' ({header.label})' if header.label else ''}, "
        f"XFS {now} MiB, lockspace {header.lockspace_bytes >> 20} MiB"
    )
    return f"{text}; the first mount grows the XFS to {then} MiB" if then > now else text


def main_adopt(args: list[str]) -> int:
    """Run ``mxfs adopt``; return the exit code: 0, or 1 with one line on stderr."""
    options = parser().parse_args(args)
    try:
        header, xfs_bytes = make_volume(options.device, options.force)
    except MxfsError as error:
        print(f"mxfs adopt: {explain(options.device, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mxfs adopt: interrupted: run it again", file=sys.stderr)
        return 1
    print(render(options.device, header, xfs_bytes))
    return 0
