"""``mxfs fsck DEVICE [-n] [--json]`` and ``fsck.mxfs``: checks, and repairs, a volume that no node has.

Exit codes of fsck(8): 0 clean, 1 repaired, 4 errors left, 8 not checked (with one line that says why and the way out).
The XFS is left to xfs_repair(8), which finds it at the beginning of the device and keeps to its size. A log that has to
be replayed is never thrown away.
"""

import argparse
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any

from mxfs_proto.errors import IoFailure, MediaError, MxfsError
from mxfs_proto.ondisk import DeviceTooSmall, ForeignRecord, OtherVersion, format_uuid
from mxfs_proto.xfs_sb import NotXfs
from mxfsd import xfsprogs
from mxfsd.cli.device import check_device, explain, kinds
from mxfsd.cli.mount import MountError, check_not_running, what_instead
from mxfsd.cli.oneline import OneLineParser
from mxfsd.hold import Hold
from mxfsd.io.clock import now_ms
from mxfsd.io.lockspace import Lockspace
from mxfsd.lockcheck import Damage, Stale, find_damage, repair, watch_nodes
from mxfsd.options import MountOptions

EXIT_CLEAN, EXIT_REPAIRED, EXIT_ERRORS, EXIT_FAILED = 0, 1, 4, 8
_PR_SET_PDEATHSIG = 1
_DIRTY = "valuable metadata changes in a log"
"""xfs_repair's words for a log that is to be replayed, with -n (exit code 1 then) and without (2)."""
_LINES = 20
_PROGRESS = ("Phase ", "        - ", "No modify flag set", "done", "Note - ")
_POLL_S = 0.02


class CannotCheck(MxfsError):
    """Why the volume is not checked, and what to do about it. Nothing was changed."""


@dataclass(slots=True)
class Result:
    """What was found and done. *xfs*: clean, dirty log, corrupt, repaired, unreadable, not checked."""

    device: str
    volume: str
    change: bool = False
    """Whether it was to be repaired."""
    records: list[Damage] = field(default_factory=list)
    stale: list[Stale] = field(default_factory=list)
    xfs: str = "clean"
    xfs_says: list[str] = field(default_factory=list)
    held: str = ""
    failure: str = ""
    """What kept the rest from being done; what was done before it stands above."""

    @property
    def code(self) -> int:
        """The exit code."""
        if self.failure:
            return EXIT_FAILED
        if self.xfs not in ("clean", "repaired") or any(not damage.repaired for damage in self.records):
            return EXIT_ERRORS
        return EXIT_REPAIRED if self.records or self.xfs == "repaired" else EXIT_CLEAN


def say(text: str) -> None:
    """Tell how it goes, apart from the result."""
    print(f"fsck: {text}", file=sys.stderr, flush=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def open_volume(device: str, *, writable: bool) -> tuple[Lockspace, bool]:
    """Return the lockspace, and whether there is an XFS superblock that belongs to it. Raises CannotCheck."""
    try:
        try:
            return Lockspace.open(device, readonly=not writable), True
        except NotXfs:
            held = kinds(device)
            if held not in ([], ["xfs"]):
                raise CannotCheck(
                    f"{device} holds {' and '.join(held)} where the volume's XFS was: mkfs.mxfs -f makes a new volume"
                ) from None
            return Lockspace.open(device, readonly=not writable, check_xfs=False), False
    except ForeignRecord as error:
        detail = str(error)
        raise CannotCheck(detail if "belongs to" in detail else f"{device} {what_instead(device, detail)}") from None
    except OtherVersion as error:
        raise CannotCheck(f"{device}: {error}: check it with the mxfs that its nodes run") from None
    except DeviceTooSmall as error:
        raise CannotCheck(str(error)) from None
    except MediaError as error:
        raise CannotCheck(
            f"{device}: no copy of the lockspace's header is good ({error}): nothing can be repaired without it"
        ) from None


# -- the XFS -----------------------------------------------------------------------------------------------------------


def _before_exec() -> None:
    """In the child: no FUSE mount that may hang in sight, and no life after this program, whose hold protects it."""
    xfsprogs.hide_fuse_mounts()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def xfs_repair(device: str, *options: str, hold: Hold | None = None) -> tuple[int, list[str], bool]:
    """Run xfs_repair(8); return exit code, what it complains of, and whether the log has to be replayed.

    With *hold* it is killed before that ends. Raises CannotCheck, IoFailure.
    """
    tool = xfsprogs.program("xfs_repair")
    if _gone(hold):
        raise IoFailure(_not_held(hold))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            child = subprocess.Popen(
                [tool, *options, device],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=xfsprogs.environment(),
                preexec_fn=_before_exec,
            )
        except OSError as error:
            raise CannotCheck(f"cannot run {tool}: {error.strerror}: install xfsprogs") from None
        try:
            _wait(child, hold)
        except BaseException:
            child.kill()
            child.wait()
            raise
        lines, dirty, began = _complaints(output)
    if not began or child.returncode < 0:
        raise CannotCheck(f"xfs_repair could not work on {device}: {lines[0] if lines else child.returncode}")
    return child.returncode, lines, dirty


def _wait(child: subprocess.Popen[bytes], hold: Hold | None) -> None:
    """Wait for the end. Raises IoFailure, the child killed, where the volume is not ours any more."""
    while child.poll() is None:
        if _gone(hold):
            child.kill()
            child.wait()
            raise IoFailure(_not_held(hold))
        time.sleep(_POLL_S)


def _gone(hold: Hold | None) -> bool:
    return hold is not None and (bool(hold.lost) or now_ms() >= hold.fence_at_ms)


def _not_held(hold: Hold | None) -> str:
    why = hold.lost if hold is not None and hold.lost else "the disk did not answer in time"
    return (
        f"xfs_repair was stopped, the volume could not be held ({why}): run mxfs fsck again before anything mounts it"
    )


def _complaints(output: IO[str]) -> tuple[list[str], bool, bool]:
    """Return the first lines that are no news of progress, whether the log is dirty, and whether it began at all."""
    output.seek(0)
    lines: list[str] = []
    more, dirty, began = 0, False, False
    for line in output:
        dirty = dirty or _DIRTY in line
        began = began or line.startswith("Phase ")
        if line.startswith(_PROGRESS) or not line.strip():
            continue
        if len(lines) < _LINES:
            lines.append(line.strip())
        else:
            more += 1
    if more:
        lines.append(f"and {more} lines more: see xfs_repair -n")
    return lines, dirty, began


def check_xfs(result: Result) -> None:
    """Look at the XFS without changing it."""
    code, lines, dirty = xfs_repair(result.device, "-n")
    if code == 0:
        result.xfs = "clean"
        return
    result.xfs = "dirty log" if dirty else "corrupt"
    # What a log that was not replayed makes look wrong is no damage.
    result.xfs_says = [] if dirty else lines


def repair_xfs(result: Result, pr_device: str | None) -> None:
    """Repair the XFS while no node can mount it. Raises MxfsError."""
    say("holding the volume for xfs_repair")
    with Hold(result.device, "fsck", pr_device) as hold:
        result.held = f"slot {hold.slot}, epoch {hold.epoch}"
        _, again, dirty = xfs_repair(result.device, "-n", hold=hold)
        if dirty:
            # A node was there since the check and died.
            result.xfs, result.xfs_says = "dirty log", []
            return
        code, lines, dirty = xfs_repair(result.device, "-e", hold=hold)
        if dirty:
            result.xfs, result.xfs_says = "dirty log", []
            return
        result.xfs_says = lines or again
        left, lines, dirty = xfs_repair(result.device, "-n", hold=hold)
        if left == 0:
            result.xfs = "repaired"
        else:
            result.xfs_says = lines
            say(f"xfs_repair ended with {code} and left errors")


# -- the whole ---------------------------------------------------------------------------------------------------------


def check(device: str, *, change: bool, pr_device: str | None = None) -> Result:
    """Check the volume, and repair it if *change*. Raises MxfsError: it was not (wholly) checked.

    *pr_device*: where the persistent reservations are, if not at the device.
    """
    check_device(device, "check", "check it with -n, or make it writable (blockdev --setrw)" if change else "")
    try:
        return _check(device, change=change, pr_device=pr_device)
    except IoFailure as error:
        raise CannotCheck(explain(device, error)) from None


def _check(device: str, *, change: bool, pr_device: str | None) -> Result:
    lockspace, has_xfs = open_volume(device, writable=change)
    try:
        uuid = format_uuid(lockspace.volume)
        try:
            check_not_running(MountOptions().run_dir(uuid))
        except MountError as error:
            raise CannotCheck(f"{device}: {error}: unmount it first") from None
        result = Result(device, uuid, change, stale=watch_nodes(lockspace, say), records=find_damage(lockspace))
        result.xfs = "not checked" if has_xfs else "unreadable"
        try:
            if change:
                repair(lockspace, result.records)
        except MxfsError as error:
            result.failure = explain(device, error)
            return result
    finally:
        lockspace.close()
    if has_xfs:
        try:
            check_xfs(result)
            if change and result.xfs == "corrupt":
                repair_xfs(result, pr_device)
        except MxfsError as error:
            result.failure = explain(device, error)
    return result


def as_json(result: Result) -> dict[str, Any]:
    """Return the fields for programs."""
    return {
        "device": result.device,
        "volume": result.volume,
        "exit": result.code,
        "records": [
            {"record": d.name, "reason": d.reason, "repairable": d.repair is not None, "repaired": d.repaired}
            for d in result.records
        ],
        "stale": [{"slot": s.slot, "node": s.node, "state": s.state, "is_home": s.is_home} for s in result.stale],
        "xfs": result.xfs,
        "xfs_repair": result.xfs_says,
        "held": result.held or None,
        "failure": result.failure or None,
    }


def render(result: Result) -> str:
    """Return the text form."""
    lines = [f"{result.device}: MXFS volume {result.volume}"]
    for slot in result.stale:
        home = ", the home," if slot.is_home else ""
        lines.append(f"slot {slot.slot}: node {slot.node!r}{home} is dead (it left the slot {slot.state}): no damage")
    for damage in result.records:
        left = "not written" if result.change else "run without -n to write it anew"
        done = "written anew" if damage.repaired else damage.advice or left
        lines.append(f"{damage.name}: damaged: {damage.reason}: {done}")
    lines += [f"xfs_repair: {line}" for line in result.xfs_says]
    if result.held:
        lines.append(f"XFS: the volume was held for the repair ({result.held})")
    advice = {
        "clean": "",
        "repaired": "",
        "corrupt": ": not repaired" if result.change else ": run without -n to repair it",
        "dirty log": f": its home died. Mount it once, which replays the log: mount -t mxfs {result.device} DIR",
        "not checked": "",
        "unreadable": ": no superblock at the beginning of the device; see xfs_repair(8) for the search for a copy",
    }[result.xfs]
    lines.append(f"XFS: {result.xfs}{advice}")
    words = {EXIT_CLEAN: "clean", EXIT_REPAIRED: "repaired", EXIT_ERRORS: "errors left", EXIT_FAILED: "not done"}
    lines.append(f"{result.device}: {words[result.code]}")
    return "\n".join(lines)


class _Parser(OneLineParser):
    """fsck(8) has a code of its own for what was not done."""

    refused = EXIT_FAILED


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of ``mxfs fsck``."""
    made = _Parser(
        prog=prog,
        description="Check and repair an MXFS volume that no node has mounted.",
        epilog="Exit codes: 0 clean, 1 repaired, 4 errors left, 8 not checked.",
    )
    made.add_argument("device", help="block device with an MXFS volume")
    made.add_argument("-n", dest="no_change", action="store_true", help="only look: change nothing")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--prdev", metavar="DEV", help="as the mount option prdev=, where the nodes have it")
    return made


def helper_parser() -> argparse.ArgumentParser:
    """Return the parser of ``fsck.mxfs``, which takes fsck(8)'s options too."""
    made = parser("fsck.mxfs")
    made.add_argument("-a", "-p", dest="boot", action="store_true", help="at boot: do nothing, as fsck.xfs(8)")
    made.add_argument("-y", "-f", "-r", "-V", dest="ignored", action="store_true", help="taken and ignored")
    made.add_argument("-C", dest="progress", nargs="?", metavar="FD", help="taken and ignored")
    return made


def main_fsck(args: list[str]) -> int:
    """Run ``mxfs fsck``; return the exit code."""
    options = parser("mxfs fsck").parse_args(args)
    return _run("mxfs fsck", options)


def main(args: list[str] | None = None) -> int:
    """Run ``fsck.mxfs``; return the exit code."""
    options = helper_parser().parse_args(sys.argv[1:] if args is None else args)
    if options.boot:
        # Other nodes use the volume meanwhile: the boot of one is no time to check it, and XFS replays its log.
        return EXIT_CLEAN
    return _run("fsck.mxfs", options)


def _run(prog: str, options: argparse.Namespace) -> int:
    import structlog

    if not structlog.is_configured():
        from mxfsd import log

        log.configure(level="warning")
    try:
        result = check(options.device, change=not options.no_change, pr_device=options.prdev)
    except MxfsError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was begun may be half done: run it again", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(as_json(result), indent=2) if options.json else render(result))
    if result.failure:
        print(f"{prog}: {result.failure}", file=sys.stderr)
    return result.code


if __name__ == "__main__":
    sys.exit(main())
