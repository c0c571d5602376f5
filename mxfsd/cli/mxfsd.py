"""mxfsd: the daemon of one volume; started by mount.mxfs or by systemd, not by hand."""

import argparse
import asyncio
import faulthandler
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon
    from mxfsd.io.servicemanager import ServiceManager
    from mxfsd.options import MountOptions


def parser() -> argparse.ArgumentParser:
    """Return the parser of the daemon's command line."""
    made = argparse.ArgumentParser(prog="mxfsd", description="the daemon of one MXFS volume on this node")
    made.add_argument("--device", required=True)
    made.add_argument("--mountpoint", required=True)
    made.add_argument("--options", default="")
    made.add_argument("--run-dir")
    made.add_argument("--ready-fd", type=int, default=-1)
    made.add_argument("--supervised", action="store_true", help="a service manager starts it again where it fails")
    made.add_argument("--fuse-pid", type=int, default=0, help="go on with this FUSE process, or with none")
    return made


def main() -> int:
    """Entry point. Tells ``--ready-fd`` one line: ``ready``, or ``error: REASON``. Returns the exit status.

    0: the mount is gone, or this node is out of the volume: there is nothing to start again for. EXIT_FAILED: the FUSE
    layer waits for the next daemon. 1: not mounted, or not gone on with.
    """
    args = parser().parse_args()
    # A watchdog that ends a daemon whose event loop hangs does it by SIGABRT: the log then says where it hung.
    faulthandler.enable()

    from mxfsd import log, options
    from mxfsd.io import libc
    from mxfsd.io.servicemanager import ServiceManager

    manager = ServiceManager.take(os.environ)
    libc.keep_freed_memory()
    parsed = options.parse(args.options)
    log.configure(level=parsed.log)
    return asyncio.run(_serve(args, parsed, manager))


async def _serve(args: argparse.Namespace, parsed: object, manager: "ServiceManager") -> int:
    import structlog

    from mxfs_proto.errors import MxfsError, Refusal
    from mxfsd import reattach
    from mxfsd.daemon import Daemon
    from mxfsd.options import MountOptions
    from mxfsd.report import in_words

    assert isinstance(parsed, MountOptions)
    logger = structlog.get_logger("mxfsd")
    daemon: Daemon | None = None
    status = 0
    last = ""
    try:
        run_dir = _run_dir(args, parsed)
        run_dir.mkdir(parents=True, exist_ok=True)
        daemon = Daemon(
            args.device,
            args.mountpoint,
            parsed,
            run_dir,
            supervised=args.supervised,
            goes_on_with=args.fuse_pid,
            manager=manager,
        )
        await daemon.start()
        manager.ready(in_words(daemon))
        _say(args.ready_fd, "ready")
        last = await daemon.run()
        logger.info("leaving", reason=last)
    except reattach.NothingToServe as exc:
        last = str(exc)
        logger.info("nothing to serve", reason=last)
    except (MxfsError, OSError) as exc:
        logger.error("mxfsd failed", reason=str(exc))
        last = f"error: {exc}".replace("\n", " ")
        _say(args.ready_fd, last)
        status = 1
        if daemon is not None and daemon.adopted:
            if isinstance(exc, Refusal):
                daemon.refused(str(exc))
                status = 0
            else:
                daemon.failed = True
    except Exception:
        logger.exception("mxfsd failed")
        last = "error: an internal error, see the log"
        if daemon is not None:
            daemon.failed = daemon.adopted
        status = 1
    finally:
        if daemon is not None and daemon.failed:
            # As if killed: the heartbeat process does what is due then, and the FUSE layer waits for the next daemon.
            sys.stderr.flush()
            os._exit(reattach.EXIT_FAILED)
        manager.leaving(last, clean=status == 0)
        if daemon is not None:
            await _leave(daemon)
    return status


async def _leave(daemon: "Daemon") -> None:
    """Leave in good order, but not for ever: what hangs then ends as in a crash, which the others are made for."""
    try:
        await asyncio.wait_for(daemon.shut_down(), daemon.timeouts.lock_wait_ms / 1000)
    except TimeoutError:
        import structlog

        structlog.get_logger("mxfsd").error("did not leave in time: ends as in a crash")
        sys.stderr.flush()
        os._exit(1)


def _run_dir(args: argparse.Namespace, parsed: "MountOptions") -> Path:
    if args.run_dir:
        return Path(args.run_dir)
    import uuid

    from mxfsd.admission import volume_of

    return Path(parsed.run_dir(str(uuid.UUID(bytes=volume_of(args.device, parsed.pr_device)))))


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
