"""Two guests that boot as Debian does, and what the README says: iSCSI, ``mxfs install``, a line in fstab, a reboot.

What they write is on a disk of their own, and there after a reboot. Nothing is started by hand after the first boot.
Two that boot at once on an emulated processor may need half a minute to start a daemon: ``timeouts=patient``.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import cluster as clusters
import image
import pytest
from channel import Command, GuestError
from cluster import CHECKOUT, MOUNTPOINT, REPLACEMENT_S, WIRE_PORT, Node
from machine import Machine
from netspace import NetSpace
from relay import Relay
from storage import DISK_BYTES, NAME, PORT, Storage, check_copy, check_image, initiator

pytestmark = pytest.mark.timeout(600)

KEPT_BYTES = 512 << 20
LIMIT_S = 150.0
MOUNT_S = 120.0
"""From the moment in which a guest takes commands, early in its boot, until the volume is there."""
DOWN_S = 90.0
HANDED_OVER_S = 30.0
"""A home that leaves hands over at once; one that is just gone is replaced after 60 s at the earliest."""
TAKEOVER_S = 180.0
USER = "/etc/systemd/system/user.service"
LAST_WORDS = f"{MOUNTPOINT}/last-words"
_USER = f"""[Unit]
RequiresMountsFor={MOUNTPOINT}
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
# It has things to put in order as it ends.
ExecStop=/bin/sh -c "sleep 3; echo stopped >{LAST_WORDS}"
"""
_ORDER = (
    "Stopped.*user.service",
    "Unmounted.*mnt-shared.mount",
    "Stopped.*mxfsd@",
    "Stopping.*open-iscsi",
    "Stopping.*guest-network",
)
_DIED = ("home fenced", "node fenced")


class _Booted(Machine):
    """A guest with a disk of its own, whose first process is Debian's systemd."""

    init = "init-boot"
    words = " mxfs.kept=/dev/vdb"

    def wait_down(self) -> None:
        """Wait until it has turned itself off, or would start again. GuestError, with its console, when it does not."""
        assert self._process is not None
        try:
            self._process.wait(DOWN_S)
        except subprocess.TimeoutExpired:
            raise GuestError(f"{self.name}: not down within {DOWN_S:.0f} s\n{self.logs()}") from None
        self.power_off()


class Pair:
    """Two nodes whose fstab has the volume."""

    def __init__(self, folder: Path, boot: image.Boot, space: NetSpace, times: list[str]) -> None:
        self.folder = folder
        self.times = times
        self.device = ""
        self.nodes: list[Node] = []
        self.storage = Storage(folder, space, DISK_BYTES)
        for number in (1, 2):
            disk = folder / f"kept{number}.img"
            with open(disk, "wb") as file:
                file.truncate(KEPT_BYTES)
            subprocess.run(["mke2fs", "-q", "-t", "ext4", str(disk)], check=True, timeout=60)
            machine = _Booted(number, folder / f"n{number}", boot, space, WIRE_PORT, disks=(disk,))
            self.nodes.append(Node(machine, Relay(space, PORT)))

    def boot(self) -> None:
        """Turn on what is off."""
        off = [node for node in self.nodes if not node.machine.on]
        for node in off:
            node.machine.power_on()
        for node in off:
            node.machine.wait_up()

    def set_up(self) -> None:
        """What an operator types, once, up to the reboot."""
        self.boot()
        with ThreadPoolExecutor() as pool:
            (self.device,) = set(pool.map(self._set_up, self.nodes))
        self.nodes[0].must(f"mkfs.mxfs {self.device}", LIMIT_S)
        for node in self.nodes:
            node.must(f"echo '{self.device} {MOUNTPOINT} mxfs _netdev,timeouts=patient 0 0' >>/etc/fstab", LIMIT_S)
        _down("reboot", *self.nodes)

    @staticmethod
    def _set_up(node: Node) -> str:
        record = f"iscsiadm -m node -T {NAME} -p 10.0.{node.machine.number}.2:{node.relay.port}"
        return node.must(
            f"""set -e
            {CHECKOUT}/.venv/bin/mxfs install >/dev/null
            echo InitiatorName={initiator(node.name)} >/etc/iscsi/initiatorname.iscsi
            {record} -o new >/dev/null
            {record} -o update -n node.startup -v automatic
            {record} -o update -n node.session.timeo.replacement_timeout -v {REPLACEMENT_S}
            mkdir {MOUNTPOINT}
            systemctl start open-iscsi
            for i in $(seq 300); do ls /dev/disk/by-id/wwn-* 2>/dev/null && exit; sleep 0.1; done; exit 1""",
            LIMIT_S,
        ).strip()

    def up(self) -> tuple[Node, Node]:
        """Boot what is off, and wait until both have the volume; return the home first."""
        began = time.monotonic()
        self.boot()
        for node in self.nodes:
            self.wait(partial(_has_mount, node), MOUNT_S, f"mounted on {node.name}")
        self.times.append(f"boot until mounted on both {time.monotonic() - began:.0f} s")
        self.wait(lambda: _agreed(self.nodes), LIMIT_S, "both serving, with one home")
        one, other = self.nodes
        return (one, other) if _home(one) == one.name else (other, one)

    def wait(self, condition: Callable[[], object], seconds: float, what: str) -> float:
        """Wait until something holds; return how long it took."""
        return clusters.wait(condition, seconds, what, self.logs)

    def logs(self) -> str:
        """What a failed test's report needs."""
        parts = []
        for node in self.nodes:
            parts.append(node.machine.logs(80))
            if node.machine.on:
                text = node.run("tail -n 60 /run/mxfs/*/daemon.log; systemctl list-jobs; journalctl -b -n 60", 40.0)
                parts.append(f"--- {node.name}\n{text.out}{text.err}")
        return "\n".join(parts)

    def close(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.machine.power_off()
            node.relay.close()
        self.storage.close()


@pytest.fixture(scope="module")
def pair(boot: image.Boot, times: list[str]) -> Iterator[Pair]:
    """Two guests that are set up, and off. The end checks the image."""
    folder = clusters.scratch()
    space = NetSpace()
    pair = None
    try:
        pair = Pair(folder, boot, space, times)
        pair.set_up()
        yield pair
        for node in pair.nodes:
            node.machine.power_off()
        check_copy(pair.storage.image, folder)
    except BaseException:
        if pair is not None:
            print(pair.logs())
        raise
    finally:
        if pair is not None:
            pair.close()
        space.close()
        clusters.remove(folder)


def _has_mount(node: Node) -> bool:
    return node.run(f"mountpoint -q {MOUNTPOINT}").code == 0


def _home(node: Node) -> str:
    """Who a node says is the home; nobody while it does not serve."""
    with suppress(GuestError):
        status = node.status()
        return str(status["home"]) if status["state"] == "serving" else ""
    return ""


def _agreed(nodes: list[Node]) -> bool:
    names = set(map(_home, nodes))
    return len(names) == 1 and "" not in names


def _down(how: str, *nodes: Node) -> None:
    for node in nodes:
        node.must(f"systemctl --no-block {how}")
    for node in nodes:
        assert isinstance(node.machine, _Booted)
        node.machine.wait_down()


def _stop(writer: Command, node: Node, folder: str) -> None:
    writer.signal(15)
    done = writer.wait(LIMIT_S)
    assert done.code == 0, done.err
    node.check_files(folder, node.name, len(writer.lines()))


def test_fstab_mounts_it_after_a_reboot(pair: Pair) -> None:
    home, other = pair.up()
    for node in (home, other):
        assert node.must(f"findmnt -n -o FSTYPE {MOUNTPOINT}").strip() == "fuse.mxfs"
        unit = node.must("systemctl show -p FragmentPath --value mnt-shared.mount").strip()
        assert unit == "/run/systemd/generator/mnt-shared.mount"
        assert node.must("systemctl is-active remote-fs.target").strip() == "active"
    home.must(f"echo {home.name} >{MOUNTPOINT}/{home.name}")
    assert other.must(f"cat {MOUNTPOINT}/{home.name}") == f"{home.name}\n"


def test_a_home_that_shuts_down_leaves_nothing_to_recover(pair: Pair) -> None:
    """Unmounted, handed over and gone from the disk, then iSCSI and the network go down; the other goes on at once."""
    home, other = pair.up()
    other.must(f"mkdir {MOUNTPOINT}/shut-down")
    writer = other.writer("shut-down", other.name)
    writer.wait_lines(5, LIMIT_S)
    home.must(f"printf '{_USER}' >{USER}; systemctl daemon-reload; systemctl start user")
    home.must(f"echo kept >{MOUNTPOINT}/unsynced; systemctl --no-block poweroff")
    slowest, last, count = 0.0, time.monotonic(), len(writer.lines())
    deadline = last + DOWN_S
    while home.machine.on or time.monotonic() - last > 2:
        if len(writer.lines()) > count:
            slowest, last, count = max(slowest, time.monotonic() - last), time.monotonic(), len(writer.lines())
        assert time.monotonic() < deadline, pair.logs()
        time.sleep(0.05)
    home.machine.power_off()
    pair.times.append(f"shutdown of the home: the writer on the other stood still for {slowest:.1f} s at most")
    assert slowest < HANDED_OVER_S
    assert not other.logged(*_DIED), other.log()
    slots = other.status()["nodes"]
    assert [one["name"] for one in slots if one["state"] != "left"] == [other.name], slots
    assert len(re.findall("0x4d58", other.must(f"sg_persist --in --read-keys {pair.device}"))) == 1
    _stop(writer, other, "shut-down")
    assert other.must(f"cat {MOUNTPOINT}/unsynced {LAST_WORDS}") == "kept\nstopped\n"
    said = home.machine.console.read_text(errors="replace").splitlines()
    order = [max(at for at, line in enumerate(said) if re.search(what, line)) for what in _ORDER]
    assert order == sorted(order), "\n".join(said[-100:])


def test_all_shut_down_and_boot_again(pair: Pair) -> None:
    """One may be down already: the last one that goes down has nobody to hand over to."""
    last = [node for node in pair.nodes if node.machine.on] or pair.up()
    for node in last:
        node.must(f"echo {node.name} >>{MOUNTPOINT}/last")
    for node in last:
        _down("poweroff", node)
    check_image(pair.storage.image)  # the log is clean: nothing of it to replay
    for node in pair.up():
        assert node.must(f"cat {MOUNTPOINT}/last").split() == [one.name for one in last]
        assert not node.logged(*_DIED), node.log()


def test_the_home_loses_its_power_while_the_other_writes(pair: Pair) -> None:
    home, other = pair.up()
    other.must(f"mkdir {MOUNTPOINT}/power")
    writers = {node: node.writer("power", node.name) for node in (home, other)}
    for writer in writers.values():
        writer.wait_lines(15, LIMIT_S)
    home.machine.power_off()
    count = len(writers[other].lines())
    took = pair.wait(lambda: len(writers[other].lines()) > count + 3, TAKEOVER_S, "the writer goes on")
    pair.times.append(f"power of the home cut: the writer on the other goes on after {took:.0f} s")
    assert other.logged("home fenced")
    _stop(writers[other], other, "power")
    other.check_files("power", home.name, len(writers[home].lines()))
