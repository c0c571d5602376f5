"""``mxfs grow DEVICE``: after the LUN grew, the volume that no node has gets the new room."""

import argparse
import sys

from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import format_uuid
from mxfsd.cli import device as devices
from mxfsd.cli.device import WRITABLE, explain
from mxfsd.cli.fsck import open_volume
from mxfsd.cli.mount import MountError, check_not_running
from mxfsd.cli.oneline import OneLineParser
from mxfsd.grow import CannotGrow, Grown, grow
from mxfsd.options import MountOptions


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mxfs grow``."""
    made = OneLineParser(
        prog="mxfs grow",
        description="Give a volume the new room of its device. No node may have it mounted.",
        epilog="The XFS grows when the volume is mounted next.",
    )
    made.add_argument("device", help="block device with an MXFS volume, which has grown")
    made.add_argument("--prdev", metavar="DEV", help="as the mount option prdev=, where the nodes have it")
    return made


def say(text: str) -> None:
    """Tell how it goes, apart from the result."""
    print(f"grow: {text}", file=sys.stderr, flush=True)


def check_device(device: str) -> None:
    """Raise CannotGrow where this host cannot, or must not, write to the device."""
    try:
        devices.check_device(device, "grow", WRITABLE)
        lockspace, has_xfs = open_volume(device, writable=False)
        lockspace.close()
        if not has_xfs:
            raise CannotGrow(f"{device}: the XFS has no superblock that can be read: see mxfs fsck {device}")
        check_not_running(MountOptions().run_dir(format_uuid(lockspace.volume)))
    except MountError as error:
        raise CannotGrow(f"{device} {error}: unmount it first") from None


def render(device: str, grown: Grown) -> str:
    """Return what to say of it."""
    return (
        f"{device}: MXFS volume {format_uuid(grown.volume)} has room for an XFS of {grown.xfs_after >> 20} MiB "
        f"(it had {grown.xfs_before >> 20} MiB): the next mount grows it"
    )


def main_grow(args: list[str]) -> int:
    """Run ``mxfs grow``; return the exit code: 0, or 1 with one line on stderr."""
    import structlog

    options = parser().parse_args(args)
    if not structlog.is_configured():
        from mxfsd import log

        log.configure(level="warning")
    try:
        check_device(options.device)
        grown = grow(options.device, say, options.prdev)
    except MxfsError as error:
        print(f"mxfs grow: {explain(options.device, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mxfs grow: interrupted; the volume can be mounted: run it again when no node has it", file=sys.stderr)
        return 1
    print(render(options.device, grown))
    return 0
