"""``mount.mxfs SPEC DIR [-sfnvrw] [-N ns] [-o options] [-t type]``: what mount(8) runs for type mxfs.

Checks everything that can be checked without writing, starts the daemon and returns when the mount answers. Fails
with one line ``mount.mxfs: SPEC: REASON`` and an exit code of mount(8): 1 usage or permission, 2 system error,
8 interrupted, 32 mount failure; after a failure nothing is left behind. Start-up time is part of the mount's, so
this process imports neither cryptography nor pyroute2, pyfuse3, structlog or asyncio.
"""

import errno
import getopt
import os
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mxfs_proto.errors import MediaError, MxfsError
from mxfsd import control, mountinfo, rundir, spawn
from mxfsd.options import MountOptions, parse

FLAGS = "sfnvrwo:t:N:"
"""For getopt(3): what mount(8) may call a helper with."""
USAGE = "usage: mount.mxfs DEVICE|UUID=…|LABEL=… DIR [-sfnvrw] [-N namespace] [-o options] [-t mxfs]"
LOCK_S = 40.0
UMOUNT_S = 10.0
EXIT_USAGE, EXIT_SYSTEM, EXIT_INTERRUPT, EXIT_MOUNT = 1, 2, 8, 32

_TAGS = ("UUID", "LABEL", "PARTUUID", "PARTLABEL", "ID")
_MOUNT_RECORD = "mount.json"


class MountError(MxfsError):
    """A mount that cannot be; the message is the reason, *code* the exit code of mount(8)."""

    def __init__(self, message: str, code: int = EXIT_MOUNT) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that answers. *daemon* is None when systemd started it."""

    device: str
    mountpoint: str
    volume: str
    run_dir: str
    daemon: spawn.Daemon | None


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line, parsed."""

    spec: str
    directory: str
    options: str
    sloppy: bool = False
    fake: bool = False
    verbose: bool = False
    namespace: str | None = None


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse mount(8)'s call of a helper: SPEC and DIR first, flags after; options may be given several times."""
    try:
        flags, operands = getopt.gnu_getopt(list(argv), FLAGS)
    except getopt.GetoptError as error:
        raise MountError(f"{error}; {USAGE}", EXIT_USAGE) from None
    if len(operands) != 2:
        raise MountError(USAGE, EXIT_USAGE)
    given = {name for name, _ in flags}
    words = [value for name, value in flags if name == "-o"]
    if "-r" in given:
        words.append("ro")
    kinds = [value for name, value in flags if name == "-t" and value not in ("mxfs", "fuse.mxfs")]
    if kinds:
        raise MountError(f"type {kinds[0]} is not mxfs; {USAGE}", EXIT_USAGE)
    namespaces = [value for name, value in flags if name == "-N"]
    return Arguments(
        spec=operands[0],
        directory=operands[1],
        options=",".join(words),
        sloppy="-s" in given,
        fake="-f" in given,
        verbose="-v" in given,
        namespace=namespaces[-1] if namespaces else None,
    )


def resolve(spec: str) -> str:
    """Return the device that SPEC names: itself, or what blkid finds for ``UUID=``, ``LABEL=`` and the like."""
    tag, equals, value = spec.partition("=")
    if not equals or tag not in _TAGS:
        return spec
    import subprocess

    value = value.strip("\"'")
    found = subprocess.run(
        ["blkid", "-l", "-o", "device", "-t", f"{tag}={value}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    device = found.stdout.strip().partition("\n")[0]
    if found.returncode != 0 or not device:
        raise MountError(
            f"no device with {tag} {value} (blkid shows those that there are; a disk that other nodes have reserved "
            "cannot be read: name it by /dev/disk/by-id)"
        )
    return device


def check_directory(directory: str) -> str:
    """Return the absolute path of the mount point; MountError if it cannot be one."""
    try:
        path = os.path.realpath(directory, strict=True)
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(f"{directory}: a dead mount is there; umount -l {directory} first") from None
        raise MountError(f"mount point {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"mount point {directory} is not a directory")
    mount = mountinfo.at(path)
    if mount is not None and mountinfo.is_mxfs(mount):
        raise MountError(f"mount point {directory}: {mount.source} is mounted there already")
    return path


def check_device(device: str) -> str:
    """Return the canonical path of a block device that this host can mount; MountError names the obstacle."""
    try:
        path = os.path.realpath(device, strict=True)
        status = os.stat(path)
    except OSError as error:
        raise MountError(error.strerror or str(error)) from None
    if not stat.S_ISBLK(status.st_mode):
        kind = "a regular file: attach it with losetup and mount the loop device"
        raise MountError(f"is {kind if stat.S_ISREG(status.st_mode) else 'not a block device'}")
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    try:
        with open(f"/sys/dev/block/{number}/ro", encoding="ascii") as file:
            if file.read().strip() == "1":
                raise MountError("is read-only; every node writes its heartbeat, with -o ro too")
    except FileNotFoundError:
        pass  # no such attribute: the open for writing will tell
    return path


def check_unused(device: str) -> None:
    """Refuse a device that something on this host has mounted or claimed."""
    number = os.stat(device).st_rdev
    for mount in mountinfo.read():
        if mount.device == number or (mountinfo.is_mxfs(mount) and _is_device(mount.source, number)):
            raise MountError(f"is mounted at {mount.mountpoint} already (type {mount.fstype})")
    try:
        # O_EXCL without O_CREAT on a block device: EBUSY while the kernel has it in use (open(2)).
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountError(
                "is in use on this host: mounted out of sight, or part of multipath, RAID or LVM"
            ) from None
        raise MountError(f"cannot open: {error.strerror}") from None


def _is_device(source: str, number: int) -> bool:
    try:
        status = os.stat(source)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == number


def volume_uuid(device: str, pr_device: str | None = None) -> str:
    """Return the uuid of the MXFS volume on the device (text form); MountError says what is there instead."""
    from mxfs_proto.ondisk import DeviceTooSmall, ForeignRecord, format_uuid
    from mxfsd.admission import volume_of

    try:
        return format_uuid(volume_of(device, pr_device))
    except ForeignRecord as error:
        raise MountError(what_instead(device, str(error))) from None
    except DeviceTooSmall as error:
        raise MountError(str(error)) from None
    except MediaError as error:
        raise MountError(f"damaged lockspace: {error}") from None
    except MxfsError as error:
        raise MountError(str(error)) from None


def what_instead(device: str, detail: str) -> str:
    """Return what is on a device that has no MXFS volume, and what to do about it."""
    from mxfsd.cli.device import NoBlkid, kinds

    try:
        held = " and ".join(kinds(device))
    except NoBlkid as error:
        return f"is no MXFS volume ({detail}); {error}"
    if not held:
        return f"holds no file system: make a volume with mkfs.mxfs {device} ({detail})"
    if held == "xfs":
        # Where an XFS was adopted after its device had grown, a host that has not noticed sees nothing else.
        return (
            "holds plain XFS, no MXFS volume, as this host sees it: if it is one elsewhere, rescan the device here; "
            f"mxfs adopt {device} makes it one, mkfs.mxfs -f {device} destroys it ({detail})"
        )
    return (
        f"holds {held}, no MXFS volume: mount it as that, or replace it by mkfs.mxfs -f {device}, which destroys it "
        f"({detail})"
    )


def check_not_running(run_dir: str) -> None:
    """Refuse a volume whose daemon runs on this host (in this run root); clear what a dead one left."""
    sock = os.path.join(run_dir, control.SOCKET_NAME)
    fuse = rundir.recall(run_dir, rundir.FUSE)
    if os.path.exists(sock) and control.answers(sock):
        who = f"its daemon answers on {sock}"
    elif fuse is not None and fuse.alive and not os.path.exists(os.path.join(run_dir, rundir.DEAD)):
        who = f"its FUSE process, pid {fuse.pid}, waits for a daemon: unmount it, or see {run_dir}/daemon.log"
    else:
        return
    import json

    where = ""
    try:
        with open(os.path.join(run_dir, _MOUNT_RECORD), encoding="utf-8") as file:
            where = f" at {json.load(file)['mountpoint']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a record that cannot be read only costs the message a word
    raise MountError(f"the volume is mounted{where} already ({who})")


def clear_dead_mount(directory: str, options: MountOptions) -> None:
    """Unmount, lazily, what a crash left at *directory*: a mount of ours whose FUSE process has ended or given up.

    Nothing below the directory is touched, which might wait for that process. What is not known to be dead stays.
    """
    parent, name = os.path.split(os.path.abspath(directory))
    path = os.path.join(os.path.realpath(parent), name)
    mount = mountinfo.at(path)
    if mount is None or not mountinfo.is_mxfs(mount):
        return
    try:
        run_dir = options.run_dir(volume_uuid(mount.source, options.pr_device))
    except MountError:
        return  # check_directory says what is there
    fuse = rundir.recall(run_dir, rundir.FUSE)
    alive = fuse is not None and fuse.alive and not os.path.exists(os.path.join(run_dir, rundir.DEAD))
    if not alive and not control.answers(os.path.join(run_dir, control.SOCKET_NAME)):
        _unmount_lazily(path)


class _DeviceLock:
    """A lock on the device file, so that two mounts of one device on this host come one after the other."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._fd = -1

    def __enter__(self) -> None:
        import fcntl

        self._fd = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC)
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                # udev and mkfs take this lock too, the one briefly; flock(2) has no timeout of its own.
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self._fd)
                    raise MountError("another program holds the device locked (mount or mkfs at work?)") from None
                time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def mount_volume(
    spec: str,
    directory: str,
    options: MountOptions,
    *,
    netns: str | None = None,
    environment: Mapping[str, str] | None = None,
    direct: bool = False,
    fake: bool = False,
) -> Mounted:
    """Mount the volume that SPEC names at *directory*; return when the mount answers.

    The run directory is ``options.run_dir(uuid)``. With *netns* the daemon lives in that network namespace (a path);
    *environment* replaces the daemon's environment; *direct* never asks systemd; *fake* only checks. Raises
    MountError; then nothing is left behind.
    """
    if os.geteuid() != 0:
        raise MountError("only root can mount it (no setuid helper, no user mounts)", EXIT_USAGE)
    clear_dead_mount(directory, options)
    mountpoint = check_directory(directory)
    device = check_device(resolve(spec))
    options = replace(options, state=os.path.abspath(options.run_root))
    with _DeviceLock(device):
        uuid = volume_uuid(device, options.pr_device)
        run_dir = options.run_dir(uuid)
        check_not_running(run_dir)
        check_unused(device)
        if fake:
            return Mounted(device, mountpoint, uuid, run_dir, None)
        kept = _prepare_run_dir(run_dir)
        unit = None if direct or netns is not None else _systemd_unit(uuid, options)
        started: spawn.Daemon | None = None
        try:
            if unit is None:
                started = _start_direct(device, mountpoint, options, run_dir, netns, environment)
            else:
                from mxfsd.cli.systemd import start_unit

                start_unit(unit, device, mountpoint, options, run_dir, ready_s(options))
            mounted = Mounted(device, mountpoint, uuid, run_dir, started)
            _record(mounted)
        except BaseException:
            _clear(mountpoint, run_dir, kept)
            raise
        return mounted


def ready_s(options: MountOptions) -> float:
    """Return for how many seconds the daemon is waited for."""
    from mxfsd.core.timeouts import Timeouts

    return Timeouts.named(options.timeouts).ready_ms / 1000


def _prepare_run_dir(run_dir: str) -> frozenset[str]:
    """Make the run directory; return the names of what earlier mounts left that must survive a failure."""
    try:
        os.makedirs(os.path.dirname(run_dir), mode=0o755, exist_ok=True)
        os.makedirs(run_dir, mode=0o700, exist_ok=True)
        # A daemon that finds a FUSE process named there goes on with it.
        rundir.forget(run_dir, rundir.FUSE, rundir.HEARTBEAT, rundir.DAEMON, rundir.FLUSHED, rundir.DEAD)
        return frozenset(name for name in os.listdir(run_dir) if name.startswith("node-"))
    except OSError as error:
        raise MountError(f"run directory {run_dir}: {error.strerror}", EXIT_SYSTEM) from None


def _start_direct(
    device: str,
    mountpoint: str,
    options: MountOptions,
    run_dir: str,
    netns: str | None,
    environment: Mapping[str, str] | None,
) -> spawn.Daemon:
    argv = daemon_command(device, mountpoint, options)
    log_path = os.path.join(run_dir, "daemon.log")
    try:
        daemon, ready_fd = spawn.launch(argv, log_path, netns=netns, environment=environment)
    except OSError as error:
        raise MountError(f"cannot start the daemon: {error}", EXIT_SYSTEM) from None
    try:
        spawn.wait_ready(ready_fd, ready_s(options), log_path)
    except BaseException as error:
        daemon.end()
        if isinstance(error, spawn.DaemonFailed):
            raise MountError(str(error)) from None
        raise
    finally:
        os.close(ready_fd)
    return daemon


def daemon_command(device: str, mountpoint: str, options: MountOptions) -> list[str]:
    """Return the daemon's command line, to which ``--ready-fd N`` is added. -P: never import from the work folder."""
    return [
        sys.executable,
        "-P",
        "-m",
        "mxfsd.cli.mxfsd",
        "--device",
        device,
        "--mountpoint",
        mountpoint,
        "--options",
        options.to_string(),
    ]


def _systemd_unit(uuid: str, options: MountOptions) -> str | None:
    """Return the unit to start where systemd is this host's init and has our unit, else None."""
    if not os.path.isdir("/run/systemd/system"):
        return None
    from mxfsd.cli.systemd import unit_for

    return unit_for(uuid, options)


def _record(mounted: Mounted) -> None:
    import json

    fields = {"device": mounted.device, "mountpoint": mounted.mountpoint, "volume": mounted.volume}
    with open(os.path.join(mounted.run_dir, _MOUNT_RECORD), "w", encoding="utf-8") as file:
        json.dump(fields, file)


def _clear(mountpoint: str, run_dir: str, kept: frozenset[str]) -> None:
    """Remove what a failed mount left: a dead mount of ours, and the run directory but for *kept*."""
    import shutil

    mount = mountinfo.at(mountpoint)
    if mount is not None and mountinfo.is_mxfs(mount):
        _unmount_lazily(mountpoint)
    if not kept:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    for entry in os.scandir(run_dir):
        if entry.name not in kept:
            os.unlink(entry.path)


def _unmount_lazily(mountpoint: str) -> None:
    import subprocess

    subprocess.run(
        ["umount", "-i", "-l", mountpoint],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=UMOUNT_S,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run mount.mxfs; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    spec = words[0] if words and not words[0].startswith("-") else ""
    prefix = f"mount.mxfs: {spec}: " if spec else "mount.mxfs: "
    try:
        arguments = parse_arguments(words)
        prefix = f"mount.mxfs: {arguments.spec}: "
        try:
            options = parse(arguments.options, sloppy=arguments.sloppy)
        except MxfsError as error:
            raise MountError(str(error), EXIT_USAGE) from None
        if arguments.namespace is not None:
            spawn.enter_mount_namespace(arguments.namespace)
        mounted = mount_volume(arguments.spec, arguments.directory, options, fake=arguments.fake)
    except MountError as error:
        print(f"{prefix}{error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    except OSError as error:
        print(f"{prefix}{error}", file=sys.stderr)
        return EXIT_SYSTEM
    if arguments.verbose:
        what = "could be mounted on" if arguments.fake else "mounted on"
        print(f"mount.mxfs: {mounted.device} (volume {mounted.volume}) {what} {mounted.mountpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
