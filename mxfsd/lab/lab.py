"""A cluster on this machine: nodes that share one disk image, each with its own network, loop device and daemon.

One kernel serves them all, so only the home may have the XFS mounted (as anywhere), and a crash of a node is made by
hand (``mxfsd.lab.crash``). Every method returns when the thing has happened, or raises an MxfsError with a one-line
reason. The volume is mounted by the same code as mount.mxfs, ``mount_volume``.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mxfs_proto.errors import IoFailure, MisuseError, MxfsError
from mxfsd import control, mountinfo, options, procs, rundir, spawn
from mxfsd.cli.mount import mount_volume
from mxfsd.lab import disk, net, target
from mxfsd.lab.crash import ancestors, crash
from mxfsd.lab.state import DEAD, MARK_ENV, STOPPED, UP, Node, Paths, State, lab_id, load, save, updating

NODES_MAX = 64
UMOUNT_S = 20.0
BUSY_RETRY_S = 1.0
LEAVE_S = 30.0
REAP_S = 5.0
STATUS_S = 3.0
MOVE_S = 60.0
KILL_S = 5.0

Say = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


class Lab:
    """The lab in one folder. *say* gets a line for each step that takes a while."""

    def __init__(self, folder: str | os.PathLike[str], say: Say = _silent) -> None:
        self.paths = Paths(Path(os.path.realpath(folder)))
        self._say = say
        if os.geteuid() != 0:
            raise MisuseError("a lab needs root: it mounts, and makes loop devices and network namespaces")

    # -- up and down -----------------------------------------------------------------------------------------------

    def up(
        self, count: int = 3, size: int = 2 << 30, timeouts: str = "fast", extra: str = "", fencing: str = "lease"
    ) -> None:
        """Make everything and mount the volume on each node; after a failure nothing of it is left.

        A disk.img that is there already (kept by an earlier ``down``) is used as it is; *size* then means nothing.
        *fencing* ``pr``: with a SCSI target for the nodes' persistent reservations.
        """
        paths = self.paths
        if not 1 <= count <= NODES_MAX:
            raise MisuseError(f"{count} nodes: a lab has 1 to {NODES_MAX}")
        if fencing == "pr":
            extra = ",".join(word for word in (extra, f"prdev={target.url(net.BRIDGE_ADDRESS)}") if word)
        extra = ",".join(word for word in (extra, f"fencing={fencing}") if word)
        options.parse(f"timeouts={timeouts},{extra}")
        names = [f"n{number}" for number in range(1, count + 1)]
        if paths.private.exists():
            raise MisuseError(f"{paths.root}: a lab is here already; see mxfs lab status, end it with mxfs lab down")
        for name in names:
            folder = paths.mountpoint(name)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise MisuseError(f"{folder} is in the way")
        new_root = not paths.root.exists()
        paths.root.mkdir(parents=True, exist_ok=True)
        paths.private.mkdir(mode=0o700)
        made_image = not paths.image.exists()
        try:
            state = State(id=lab_id(paths.root), timeouts=timeouts, options=extra)
            state.nodes = [Node(number) for number in range(1, count + 1)]
            save(paths, state)
            net.remove(state.id)
            net.build(state.id, count)
            if fencing == "pr":
                self._say("starting a SCSI target for the reservations")
                self.target(state.id).start()
            if made_image:
                disk.make_image(paths.image, size)
            for name in names:
                paths.mountpoint(name).mkdir(exist_ok=True)
                paths.run_root(name).mkdir(parents=True)
            self._format_or_reuse(made_image)
            for name in names:
                self.start(name)
        except BaseException:
            self._abandon(names, made_image, new_root)
            raise

    def _format_or_reuse(self, new: bool) -> None:
        with updating(self.paths) as state:
            first = state.nodes[0]
            first.loop = disk.attach(self.paths.image)
        if not new:
            self._say(f"using {self.paths.image} as it is")
            return
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mxfsd.cli.mkfs", first.loop],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise IoFailure(reason)
        self._say(done.stdout.strip())

    def _abandon(self, names: Sequence[str], made_image: bool, new_root: bool) -> None:
        """Undo a failed ``up``."""
        with suppress(MxfsError, OSError):
            self._end_everything()
        for name in names:
            with suppress(OSError):
                self.paths.mountpoint(name).rmdir()
        shutil.rmtree(self.paths.private, ignore_errors=True)
        if made_image:
            self.paths.image.unlink(missing_ok=True)
        if new_root:
            with suppress(OSError):
                self.paths.root.rmdir()

    def down(self, *, force: bool = False, purge: bool = False) -> None:
        """Stop every node, check the volume with xfs_repair -n, remove all but disk.img (that too with *purge*).

        A node that is busy keeps the lab up, unless *force*; one whose daemon hangs is killed, and that is reported
        when everything else is done. What the commands run by ``exec`` left running on a node is killed first.
        """
        paths = self.paths
        if not paths.private.exists():
            raise MisuseError(f"{paths.root}: no lab is here")
        if not paths.record.exists():
            # What an earlier down left after it complained: the logs.
            self._end_everything()
            self._remove(purge)
            return
        complaints: list[str] = []
        try:
            state = load(paths)
        except MisuseError as error:
            state = None  # what it named can be found without it
            complaints.append(str(error))
        for node in self._home_last(state) if state is not None else []:
            self._kill_leftovers(node)
            try:
                self._stop(node.name)
            except _Busy as error:
                if not force:
                    raise
                complaints.append(self._killed_instead(node.name, error))
            except MxfsError as error:
                complaints.append(self._killed_instead(node.name, error))
        self._end_everything()
        found = disk.check(paths.image) if paths.image.exists() else ""
        if found:
            report = paths.private / "xfs_repair.log"
            report.write_text(found, encoding="utf-8")
            complaints.append(f"xfs_repair -n complains of {paths.image}: {found.splitlines()[-1]} (all in {report})")
        if complaints:
            # The logs stay for whoever looks into it; a second down removes them.
            paths.record.unlink(missing_ok=True)
            raise IoFailure("; ".join(complaints))
        self._remove(purge)

    def _killed_instead(self, name: str, error: MxfsError) -> str:
        with suppress(MxfsError):
            self.kill(name)
        return f"{name} was killed: {error}"

    def _home_last(self, state: State) -> list[Node]:
        """The nodes that are up; the home at the end, so that it need not move for those that leave."""
        up = [node for node in state.nodes if node.state == UP]
        home = ""
        with suppress(MxfsError):
            home = self.status()["home"] if len(up) > 1 else ""
        return sorted(up, key=lambda node: node.name == home)

    def _kill_leftovers(self, node: Node) -> None:
        mark, daemon = self.paths.mark(node.name), f"{spawn.TOKEN_ENV}={node.token}"
        spared = ancestors()
        for pid in procs.marked(mark):
            if pid not in spared and not procs.has_mark(pid, daemon):
                procs.send(pid, 9, lambda number: procs.has_mark(number, mark))

    def _end_everything(self) -> None:
        """Kill what is left of the lab's nodes, without a record of them; free mounts, loop devices and namespaces."""
        paths = self.paths
        loops = disk.loops_of(paths.image) if paths.image.exists() else []
        for name in self._names_made():
            mark = paths.mark(name)
            mount = mountinfo.at(str(paths.mountpoint(name)))
            if procs.marked(mark) or (mount is not None and mountinfo.is_mxfs(mount)):
                crash(mark, str(paths.mountpoint(name)), mount.source if mount is not None else "")
            self._unmount_dead(name)
            paths.run_link(name).unlink(missing_ok=True)
        target.end(paths.mark("target"))
        shutil.rmtree(paths.run_link("target").with_suffix(".d"), ignore_errors=True)
        for loop in loops:
            disk.detach(loop, paths.image)
        net.remove(lab_id(paths.root))

    def target(self, lab: str) -> target.Target:
        """The lab's SCSI target, not started."""
        folder = self.paths.private
        # Not "ip netns exec": that makes a copy of the mount namespace too, which would keep the nodes' mounts alive.
        prefix = ("nsenter", f"--net={net.path_of(net.namespace(lab, 'br'))}")
        place = self.paths.run_link("target").with_suffix(".d")  # its socket must have a short name
        place.mkdir(parents=True, exist_ok=True)
        mark = self.paths.mark("target")
        return target.Target(folder / "reservations.img", place, net.BRIDGE_ADDRESS, prefix=prefix, mark=mark)

    def _names_made(self) -> list[str]:
        """The nodes that have a folder in .lab, record or no record."""
        return sorted(path.name for path in self.paths.private.glob("n[0-9]*"))

    def _remove(self, purge: bool) -> None:
        paths = self.paths
        for name in self._names_made():
            with suppress(OSError):
                paths.mountpoint(name).rmdir()
        shutil.rmtree(paths.private)
        if purge:
            paths.image.unlink(missing_ok=True)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def start(self, name: str, extra: str = "") -> None:
        """Mount the volume on a node that is stopped or dead; *extra* are more mount options."""
        paths = self.paths
        with updating(paths) as state:
            node = self._node(state, name)
            name = node.name
            if node.state == UP:
                raise MisuseError(f"{name} is up already")
            if disk.backing(node.loop) != str(paths.image):
                node.loop = disk.attach(paths.image)
            loop = node.loop
        link = paths.run_link(name)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(paths.run_root(name))
        words = [f"timeouts={state.timeouts},node={name},state={link}", state.options, extra]
        begun = time.monotonic()
        mounted = mount_volume(
            loop,
            str(paths.mountpoint(name)),
            options.parse(",".join(words)),
            netns=net.path_of(net.namespace(state.id, name)),
            environment={**os.environ, **dict([paths.mark(name).split("=", 1)])},
            direct=True,
        )
        assert mounted.daemon is not None  # direct=True
        with updating(paths) as state:
            node = self._node(state, name)
            node.state, node.pid, node.token = UP, mounted.daemon.pid, mounted.daemon.token
            state.volume = mounted.volume
        self._say(f"{name} mounted at {mounted.mountpoint} in {time.monotonic() - begun:.2f} s")

    def stop(self, name: str) -> None:
        """Unmount a node's volume; returns when its daemon is gone. IoFailure (EBUSY) names who holds the mount."""
        self._stop(name)

    def _stop(self, name: str) -> None:
        paths = self.paths
        node = self._up(name)
        name = node.name
        self._unmount(name)
        daemon = spawn.Daemon(node.pid, node.token)
        if not daemon.wait_gone(LEAVE_S):
            left = procs.describe(daemon.processes())
            raise IoFailure(f"{name} is unmounted, but its daemon did not end within {LEAVE_S:g} s: {left}")
        with updating(paths) as state:
            self._node(state, name).state = STOPPED

    def _unmount(self, name: str) -> None:
        mountpoint = str(self.paths.mountpoint(name))
        deadline = time.monotonic() + BUSY_RETRY_S
        while mountinfo.at(mountpoint) is not None:
            complaint = _umount(mountpoint)
            if not complaint:
                continue
            if "busy" not in complaint:
                raise IoFailure(f"{name}: {complaint}")
            # A process that has just been killed, or has just closed its last file, may still count.
            if time.monotonic() > deadline:
                who = procs.describe(procs.holders(mountpoint)) or "nobody that /proc shows"
                raise _Busy(f"{name} is busy, {mountpoint} is held by {who}", 16)
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Crash a node: XFS shut down without log flush if it is the home, its processes killed, its mount dropped."""
        paths = self.paths
        with updating(paths) as state:
            node = self._node(state, name)
            name = node.name
            if node.state != UP:
                raise MisuseError(f"{name} is not up but {node.state}")
            node.state = DEAD
        crash(paths.mark(name), str(paths.mountpoint(name)), node.loop)
        self._unmount_dead(name)
        disk.detach(node.loop, paths.image)
        with updating(paths) as state:
            self._node(state, name).loop = ""  # the next node that starts may be given that device

    def crash_process(self, name: str, which: str) -> int:
        """SIGKILL one process of a node: ``daemon``, ``fuse`` or ``heartbeat``; returns its pid when it is gone.

        The node stays up: what is left of it sees to the rest.
        """
        files = {"daemon": rundir.DAEMON, "fuse": rundir.FUSE, "heartbeat": rundir.HEARTBEAT}
        if which not in files:
            raise MisuseError(f"{which}: the processes of a node are {', '.join(files)}")
        node = self._up(name)
        found = rundir.recall(self.run_dir(node.name), files[which])
        if found is None or not found.alive:
            raise MisuseError(f"{node.name} has no {which} process just now")
        procs.send(found.pid, 9, lambda _pid: found.alive)
        if not procs.wait_until(lambda: not found.alive, KILL_S):
            raise IoFailure(f"process {found.pid} ({which} of {node.name}) does not end")
        return found.pid

    def _unmount_dead(self, name: str) -> None:
        """Drop a mount whose server is gone, whoever still has it open."""
        mountpoint = str(self.paths.mountpoint(name))
        for _ in range(8):  # a mount may cover another one
            mount = mountinfo.at(mountpoint)
            if mount is None:
                _reap_hung()
                return
            subprocess.run(
                ["umount", "-i", "-l", mountpoint], stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        raise IoFailure(f"{mountpoint} cannot be unmounted")

    def partition(self, name: str) -> None:
        """Cut a node off from the others' network; it keeps the disk."""
        self._link(name, up=False)

    def heal(self, name: str) -> None:
        """Join a node to the network again."""
        self._link(name, up=True)

    def _link(self, name: str, up: bool) -> None:
        with updating(self.paths) as state:
            node = self._node(state, name)
            net.set_link(state.id, node.number, up)
            node.partitioned = not up

    def execute(self, name: str, argv: Sequence[str]) -> NoReturn:
        """Become a command that runs on the node: in its network namespace, with its mount as work folder."""
        state = load(self.paths)
        name = self._node(state, name).name
        environment = {**os.environ, **dict([self.paths.mark(name).split("=", 1)])}
        environment.pop(spawn.TOKEN_ENV, None)
        spawn.setns(net.path_of(net.namespace(state.id, name)))
        folder = self.paths.mountpoint(name)
        os.chdir(folder)
        environment["PWD"] = str(folder)
        sys.stdout.flush()
        os.execvpe(argv[0], list(argv), environment)

    # -- the volume ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the lab's state: ``home`` (a node's name or ""), ``epoch``, ``nodes`` and what each daemon says.

        Home and epoch are those of the daemon that knows the highest epoch and serves.
        """
        state = load(self.paths)
        nodes = [self._node_status(state, node) for node in state.nodes]
        views = [node["daemon"] for node in nodes if node["daemon"] is not None]
        views.sort(key=lambda view: (view.get("epoch", 0), view.get("state") == "serving"))
        best = views[-1] if views else {}
        for node in nodes:
            node["home"] = node["state"] == UP and node["name"] == best.get("home")
        return {
            "dir": str(self.paths.root),
            "volume": state.volume,
            "timeouts": state.timeouts,
            "home": best.get("home", ""),
            "epoch": best.get("epoch", 0),
            "nodes": nodes,
        }

    def _node_status(self, state: State, node: Node) -> dict[str, Any]:
        view: dict[str, Any] | None = None
        shown = node.state
        if node.state == UP:
            try:
                view = self._ask(state, node.name, "status", STATUS_S)
            except control.NotRunning:
                shown = "failed"
            except MxfsError:
                shown = "silent"
        return {
            "name": node.name,
            "state": shown,
            "partitioned": node.partitioned,
            "address": net.address(node.number),
            "loop": node.loop,
            "mountpoint": str(self.paths.mountpoint(node.name)),
            "pid": node.pid,
            "daemon": view,
        }

    def move_home(self, name: str) -> None:
        """Move the home to a node; returns when the volume is served from there."""
        name = self._up(name).name
        state = load(self.paths)
        self._ask(state, name, "home-move", MOVE_S, node=name)

        def arrived() -> bool:
            view = self._ask(state, name, "status", STATUS_S)
            return view.get("home") == name and view.get("state") == "serving"

        if not procs.wait_until(arrived, MOVE_S):
            raise IoFailure(f"the home did not arrive at {name} within {MOVE_S:g} s")

    def log_path(self, name: str) -> Path:
        """Return where a node's daemon writes its log."""
        return self.run_dir(name) / "daemon.log"

    def run_dir(self, name: str) -> Path:
        """Return a node's run directory of the volume."""
        return self.paths.run_root(name) / load(self.paths).volume

    def _ask(self, state: State, name: str, cmd: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        path = self.paths.run_root(name) / state.volume / control.SOCKET_NAME
        return control.request(path, cmd, timeout_s, **arguments)

    def _up(self, name: str) -> Node:
        node = self._node(load(self.paths), name)
        if node.state != UP:
            raise MisuseError(f"{name} is not up but {node.state}")
        return node

    def _node(self, state: State, name: str) -> Node:
        for node in state.nodes:
            if name in (node.name, str(node.number)):
                return node
        known = ", ".join(node.name for node in state.nodes)
        raise MisuseError(f"{name}: no such node; the lab has {known}")


class _Busy(IoFailure):
    """umount says EBUSY."""


_hung: list[subprocess.Popen[bytes]] = []


def _reap_hung() -> None:
    """Wait for the umounts that hung on a daemon which is dead now."""
    for process in list(_hung):
        with suppress(subprocess.TimeoutExpired):
            process.wait(REAP_S)
            _hung.remove(process)


def _umount(mountpoint: str) -> str:
    """Run umount; return the empty string, or what it complained of. One that hangs is left to its fate."""
    process = subprocess.Popen(
        ["umount", "-i", mountpoint], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, complaint = process.communicate(timeout=UMOUNT_S)
    except subprocess.TimeoutExpired:
        # A request that the FUSE server has read and does not answer cannot be killed: waited for when that is dead.
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
        _hung.append(process)
        return f"umount {mountpoint} did not return within {UMOUNT_S:g} s"
    return "" if process.returncode == 0 else complaint.decode(errors="replace").strip()


__all__ = ["MARK_ENV", "Lab"]
