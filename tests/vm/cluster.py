"""Guests with one disk: booted at once, logged in with open-iscsi, mounted as users do, and brought back to health."""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from channel import Command, Done, GuestError
from image import CHECKOUT, Boot
from machine import Machine
from netspace import NetSpace
from relay import Relay
from storage import DISK_BYTES, NAME, PORT, Lio, SharedDisk, Storage, check_copy, check_image, initiator

DEVICE, MOUNTPOINT = "/dev/sda", "/mnt/shared"
WIRE_PORT = 7100
REPLACEMENT_S = 120
"""open-iscsi's own value: a session that is not back after this long fails what waits for it."""
MOUNT_S = 100.0
FRESH_MS = 6000
"""A slot that is active has beaten since; that of a dead node may stay as it was."""
_DAEMON = "[m]xfsd.cli.mxfsd"  # a pattern that does not match the shell whose command line it is in
_LOAD = f"{CHECKOUT}/.venv/bin/python -P {CHECKOUT}/tests/vm/guest/load.py"
_LOGS = "tail -n 60 /run/mxfs/*/daemon.log; timeout 20 mxfs status; dmesg | tail -n 20"
_R = TypeVar("_R")


class Node:
    """A guest that is to have the volume mounted."""

    def __init__(self, machine: Machine, relay: Relay) -> None:
        self.machine = machine
        self.relay = relay
        self.name = machine.name
        self.mount_s = 0.0

    def run(self, command: str, timeout_s: float = 60.0) -> Done:
        """Run a shell command to its end."""
        return self.machine.channel.run(command, timeout_s)

    def must(self, command: str, timeout_s: float = 60.0) -> str:
        """Run a shell command; GuestError unless it exits with 0."""
        return self.machine.channel.must(command, timeout_s)

    def start(self, command: str) -> Command:
        """Start a shell command."""
        return self.machine.channel.start(command)

    def writer(self, folder: str, tag: str) -> Command:
        """Start the program that writes and fsyncs files, and prints the number of each."""
        return self.start(f"exec {_LOAD} write {MOUNTPOINT}/{folder} {tag}")

    def check_files(self, folder: str, tag: str, count: int) -> None:
        """See that the first *count* files of a writer are what they must be."""
        done = self.run(f"{_LOAD} check {MOUNTPOINT}/{folder} {tag} {count}", 200.0)
        assert done.code == 0, f"{self.name}: {done.out}{done.err}"

    def attach(self, *, pings: bool = True) -> None:
        """Log in to the target; the disk is DEVICE then. *pings*: end a connection on which nothing comes for 10 s."""
        portal = f"10.0.{self.machine.number}.2:{self.relay.port}"
        node = f"iscsiadm -m node -T {NAME} -p {portal}"
        quiet = "" if pings else f"{node} -o update -n node.conn[0].timeo.noop_out_interval -v 0"
        self.must(
            f"""set -e
            modprobe -a iscsi_tcp xfs fuse sg sd_mod
            mkdir -p /etc/iscsi /var/lib/iscsi /run/lock/iscsi
            echo InitiatorName={initiator(self.name)} >/etc/iscsi/initiatorname.iscsi
            iscsid
            {node} -o new >/dev/null
            {node} -o update -n node.session.timeo.replacement_timeout -v {REPLACEMENT_S}
            {quiet}
            {node} --login >/dev/null
            for i in $(seq 100); do [ -b {DEVICE} ] && break; sleep 0.1; done
            [ -b {DEVICE} ]""",
            90.0,
        )

    def mount(self, options: str = "") -> None:
        """Mount as a user does."""
        began = time.monotonic()
        words = f"-o {options} " if options else ""
        self.must(f"mount -t mxfs {words}{DEVICE} {MOUNTPOINT}", MOUNT_S)
        self.mount_s = time.monotonic() - began

    @property
    def mounted(self) -> bool:
        """Whether the kernel has the mount and it answers."""
        return self.run(f"mountpoint -q {MOUNTPOINT} && timeout 20 ls {MOUNTPOINT} >/dev/null", 30.0).code == 0

    def status(self) -> dict[str, Any]:
        """Return what the daemon says of the volume, as ``mxfs status --json`` shows it. GuestError while none answers.

        Asked without a new Python there, whose start takes seconds in which the tests look again and again.
        """
        done = self.machine.channel.ask("status")
        if done.code:
            raise GuestError(f"{self.name}: no daemon answers: {done.err}")
        view: dict[str, Any] = json.loads(done.out.splitlines()[0])
        if not view.get("ok"):
            raise GuestError(f"{self.name}: status: {view}")
        return view

    def replacement(self, seconds: int) -> None:
        """Set how long the kernel waits for a lost session, until the next login."""
        self.must(f"echo {seconds} | tee /sys/class/iscsi_session/session*/recovery_tmo")

    def log(self) -> str:
        """Return the daemon's log."""
        return self.must("cat /run/mxfs/*/daemon.log", 30.0)

    def logged(self, *events: str) -> bool:
        """Whether the log has a line of one of these events."""
        return any(event in self.log() for event in events)


class Cluster:
    """The namespace, the target, and the nodes n1, n2, ... that use it."""

    def __init__(self, folder: Path, boot: Boot, count: int, *, lio: bool = False) -> None:
        self.folder = folder
        self.space = NetSpace()
        self.storage: SharedDisk | None = None
        self.nodes: dict[str, Node] = {}
        self.times: list[str] = []
        try:
            for number in range(1, count + 1):
                machine = Machine(number, folder / f"n{number}", boot, self.space, WIRE_PORT)
                self.nodes[machine.name] = Node(machine, Relay(self.space, PORT))
            self.storage = (
                Lio(folder, self.space, boot, list(self.nodes)) if lio else Storage(folder, self.space, DISK_BYTES)
            )
            self.boot(self.nodes.values())
            first = next(iter(self.nodes.values()))
            first.must(f"mkfs.mxfs {DEVICE}", 120.0)
        except BaseException as error:
            logs = self.logs()
            self.close()
            if isinstance(error, GuestError):
                raise GuestError(f"{error}\n{logs}") from None
            raise

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def each(self, nodes: Iterable[Node], act: Callable[[Node], _R]) -> list[_R]:
        """Do something on several nodes at once."""
        every = list(nodes)
        with ThreadPoolExecutor(max(1, len(every))) as pool:
            return list(pool.map(act, every))

    def note(self, text: str) -> None:
        """Remember a line for the summary."""
        self.times.append(text)

    def boot(self, nodes: Iterable[Node]) -> None:
        """Power on nodes that are off, at once; log them in, and install MXFS there."""
        every = list(nodes)
        if not every:
            return
        for node in every:
            node.relay.restore()
            node.machine.power_on()
        assert self.storage is not None
        self.storage.wait_up()
        for node in every:
            node.machine.wait_up()
        self.note("boot of " + ", ".join(f"{node.name} {node.machine.booted_s:.0f} s" for node in every))
        self.each(every, self._ready)

    def _ready(self, node: Node) -> None:
        # What a test holds back on the way to LIO is to arrive late, on the connection that it was sent on.
        node.attach(pings=not isinstance(self.storage, Lio))
        node.must(f"{CHECKOUT}/.venv/bin/mxfs install", 60.0)

    def mount(self, nodes: Iterable[Node], options: str = "") -> None:
        """Mount on each, one after the other: three Pythons at once that start on two cores run into the time limit."""
        for node in nodes:
            node.mount(options)
            self.note(f"mount on {node.name} {node.mount_s:.1f} s")

    def heal(self, *names: str) -> list[Node]:
        """Make exactly these nodes take part in the volume, and the others leave it; return them, the home first."""
        wanted = [self.nodes[name] for name in names]
        for node in self.nodes.values():
            node.relay.restore()
            if node.machine.on:
                node.machine.wire(True)
                if node.machine.paused:
                    node.machine.resume()
        self.boot([node for node in wanted if not node.machine.on])
        for node in self.nodes.values():
            if node.machine.on and node not in wanted and node.mounted:
                node.must(f"umount {MOUNTPOINT}", 90.0)
        for node in wanted:
            if not node.mounted:
                self.mount([node])
        self.wait(lambda: all(self._healthy(node, len(wanted)) for node in wanted), 120.0, "every node serving")
        home = self.home(wanted)
        return [home, *(node for node in wanted if node is not home)]

    @staticmethod
    def _healthy(node: Node, count: int) -> bool:
        with suppress(GuestError):
            status = node.status()
            fresh = [one for one in status["nodes"] if one["state"] == "active" and (one["age_ms"] or 0) < FRESH_MS]
            return status["state"] == "serving" and len(fresh) == count
        return False

    def restart_target(self) -> float:
        """Restart the target, at which nobody can log in meanwhile; return the seconds that it took."""
        assert self.storage is not None
        for node in self.nodes.values():
            node.relay.cut()
        took = self.storage.restart()
        for node in self.nodes.values():
            node.relay.restore()
        return took

    def home(self, nodes: Iterable[Node]) -> Node:
        """Return the home, about which these nodes agree."""
        names = {node.status()["home"] for node in nodes}
        assert len(names) == 1, f"homes {names}"
        return self.nodes[names.pop()]

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """As the function; a failure has the logs."""
        return wait(condition, seconds, what, self.logs)

    def keys(self, node: Node) -> list[str]:
        """Return the keys that the disk has, by sg_persist(8) on a node."""
        text = node.must(f"sg_persist --in --read-keys {DEVICE}", 30.0)
        return re.findall(r"^\s+(0x[0-9a-f]+)$", text, re.MULTILINE)

    def reservation(self, node: Node) -> str:
        """Return what sg_persist(8) says of the reservation."""
        return node.must(f"sg_persist --in --read-reservation {DEVICE}", 30.0)

    def check(self) -> None:
        """Check the volume as a power failure of everything would leave it now; the guests stand still meanwhile."""
        assert self.storage is not None
        running = [node.machine for node in self.nodes.values() if node.machine.on and not node.machine.paused]
        for machine in running:
            machine.pause()
        self.storage.pause(still=True)
        try:
            check_copy(self.storage.image, self.folder)
        finally:
            self.storage.pause(still=False)
            for machine in running:
                machine.resume()

    def finish(self) -> None:
        """Unmount everywhere and check the image itself."""
        assert self.storage is not None
        for node in self.nodes.values():
            if node.machine.on and node.mounted:
                node.must(f"umount {MOUNTPOINT}", 90.0)
        running = [node for node in self.nodes.values() if node.machine.on]
        self.wait(lambda: all(node.run(f"pgrep -f {_DAEMON}").code == 1 for node in running), 60.0, "no daemon runs")
        check_image(self.storage.image)

    def logs(self) -> str:
        """Return what a failed test's report needs: consoles, and the daemons' logs where a guest still answers."""
        parts = [self.storage.logs()] if self.storage is not None else []
        for node in self.nodes.values():
            parts.append(node.machine.logs())
            if node.machine.on and not node.machine.paused:
                with suppress(GuestError):
                    text = node.run(_LOGS, 40.0)
                    parts.append(f"--- {node.name} daemon.log\n{text.out}{text.err}")
        return "\n".join(parts)

    def close(self) -> None:
        """End everything."""
        for node in self.nodes.values():
            node.machine.power_off()
            node.relay.close()
        if self.storage is not None:
            self.storage.close()
        self.space.close()


def wait(condition: Callable[[], object], seconds: float, what: str, logs: Callable[[], str]) -> float:
    """Wait until something holds; return how long it took. AssertionError, with *logs*, where it does not."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}\n{logs()}")
        time.sleep(0.5)
    return time.monotonic() - began


def scratch() -> Path:
    """Return a new folder; a short path, since sockets lie in it."""
    return Path(tempfile.mkdtemp(prefix="mxfs-vm-", dir="/var/tmp"))


def remove(folder: Path) -> None:
    """Remove a folder of ``scratch``."""
    shutil.rmtree(folder, ignore_errors=True)
