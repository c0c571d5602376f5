"""mxfsd: the daemon of one volume; started by mount.mxfs or by systemd, not by hand."""

import argparse
import asyncio
import os
import sys
from pathlib import Path


def main() -> int:
    """Entry point. Tells ``--ready-fd`` one line: ``ready``, or ``error: REASON``. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="mxfsd", description="the daemon of one MXFS volume on this node")
    parser.add_argument("--device", required=True)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--options", default="")
    parser.add_argument("--run-dir")
    parser.add_argument("--ready-fd", type=int, default=-1)
    args = parser.parse_args()

    from mxfsd import log, options

    parsed = options.parse(args.options)
    log.configure(level=parsed.log)
    return asyncio.run(_serve(args, parsed))


async def _serve(args: argparse.Namespace, parsed: object) -> int:
    import structlog

    from mxfs_proto.errors import MxfsError
    from mxfsd.daemon import Daemon
    from mxfsd.io.lockspace import Lockspace
    from mxfsd.options import MountOptions

    assert isinstance(parsed, MountOptions)
    logger = structlog.get_logger("mxfsd")
    daemon: Daemon | None = None
    status = 0
    try:
        if args.run_dir:
            run_dir = Path(args.run_dir)
        else:
            import uuid

            lockspace = Lockspace.open(args.device, readonly=True)
            run_dir = Path(parsed.run_dir(str(uuid.UUID(bytes=lockspace.volume))))
            lockspace.close()
        run_dir.mkdir(parents=True, exist_ok=True)
        daemon = Daemon(args.device, args.mountpoint, parsed, run_dir)
        await daemon.start()
        _say(args.ready_fd, "ready")
        reason = await daemon.run()
        logger.info("leaving", reason=reason)
    except (MxfsError, OSError) as exc:
        logger.error("mxfsd failed", reason=str(exc))
        _say(args.ready_fd, f"error: {exc}".replace("\n", " "))
        status = 1
    finally:
        if daemon is not None:
            await daemon.shut_down()
    return status


def _say(fd: int, line: str) -> None:
    if fd < 0:
        return
    try:
        os.write(fd, line.encode() + b"\n")
        os.close(fd)
    except OSError:
        pass  # whoever started us is gone, or has its answer


if __name__ == "__main__":
    sys.exit(main())
