"""The service in a guest that systemd boots: ready when it answers, in its sandbox, started again under the mount."""

import json
import re
from collections.abc import Iterator

import cluster as clusters
import image
import pytest
from channel import Done, GuestError
from cluster import CHECKOUT, DEVICE, MOUNTPOINT, WIRE_PORT, Node
from machine import Machine
from netspace import NetSpace
from relay import Relay
from storage import DISK_BYTES, PORT, Storage, check_copy

pytestmark = pytest.mark.timeout(600)

LIMIT_S = 150.0
OPTIONS = "timeouts=patient"
"""A guest without hardware help may need more than the 30 s that a mount has by default, on a busy machine."""
WATCHDOG_S = 8
_DROP_IN = "/run/systemd/system/mxfsd@.service.d"


class _Systemd(Machine):
    """A guest whose first process is systemd."""

    init = "init-systemd"


class Guest:
    """The one node of a volume on an iSCSI disk."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def run(self, command: str, timeout_s: float = 60.0) -> Done:
        return self.node.run(command, timeout_s)

    def must(self, command: str, timeout_s: float = 60.0) -> str:
        return self.node.must(command, timeout_s)

    def show(self) -> dict[str, str]:
        """What systemd says of the volume's unit; it knows none that is neither running nor failed."""
        unit = self.must("systemctl --no-legend --plain --all list-units 'mxfsd@*' | cut -d' ' -f1").strip()
        names = "Id,Type,ActiveState,MainPID,NRestarts,StatusText,WatchdogUSec,Result"
        lines = self.must(f"systemctl show -p {names} {unit}").splitlines() if unit else []
        return dict(line.split("=", 1) for line in lines)

    def wait(self, command: str, what: str) -> None:
        """Wait in the guest until a command succeeds."""
        tries = int(LIMIT_S * 4)
        done = self.run(f"for i in $(seq {tries}); do {command} && exit 0; sleep 0.25; done; exit 1", LIMIT_S * 2)
        assert done.code == 0, f"never: {what}\n{self.show()}\n{self.node.log()}"

    def restarted(self, before: dict[str, str]) -> dict[str, str]:
        """Wait until the unit is active with another daemon than *before*; return what systemd says of it then."""
        unit, pid = before["Id"], before["MainPID"]
        show = f"systemctl show -p MainPID --value {unit}"
        self.wait(f'[ "$({show})" != {pid} ] && systemctl is-active -q {unit}', "the next daemon is ready")
        return self.show()

    def drop_in(self, *lines: str) -> None:
        """Have the unit run with other directives."""
        text = "\\n".join(["[Service]", *lines])
        self.must(f"mkdir -p {_DROP_IN}; printf '{text}\\n' >{_DROP_IN}/test.conf; systemctl daemon-reload")

    def mount(self) -> None:
        try:
            self.node.mount(OPTIONS)
        except GuestError as error:
            raise GuestError(f"{error}\n{self.node.machine.logs()}") from None

    def unmount(self) -> None:
        self.must(f"umount {MOUNTPOINT}", LIMIT_S)
        self.wait("[ -z \"$(systemctl --no-legend --all list-units 'mxfsd@*')\" ]", "the unit has ended well")


@pytest.fixture(scope="module")
def guest(boot: image.Boot) -> Iterator[Guest]:
    """A guest with a volume that is not mounted. Its end checks the image."""
    folder = clusters.scratch()
    space = NetSpace()
    storage = relay = None
    machine = _Systemd(1, folder / "n1", boot, space, WIRE_PORT)
    try:
        storage = Storage(folder, space, DISK_BYTES)
        relay = Relay(space, PORT)
        machine.power_on()
        machine.wait_up()
        node = Node(machine, relay)
        node.attach()
        node.must(f"{CHECKOUT}/.venv/bin/mxfs install", 90.0)
        node.must(f"mkfs.mxfs {DEVICE}", 120.0)
        # A guest reads each module slowly the first time, and a mount has 30 s for everything.
        node.must(
            f"cd / && {CHECKOUT}/.venv/bin/python -P -c 'import mxfsd.daemon, mxfsd.heartbeat, mxfs_fuse.main'", 120
        )
        yield Guest(node)
        if node.mounted:
            Guest(node).unmount()
        check_copy(storage.image, folder)  # the daemon that was killed last has left a log to replay
    except BaseException:
        print(machine.logs())
        raise
    finally:
        machine.power_off()
        if relay is not None:
            relay.close()
        if storage is not None:
            storage.close()
        space.close()
        clusters.remove(folder)


@pytest.fixture
def mounted(guest: Guest) -> Iterator[Guest]:
    """The guest with the volume mounted."""
    guest.mount()
    yield guest
    guest.unmount()
    guest.run(f"rm -rf {_DROP_IN}; systemctl daemon-reload")


def _status(guest: Guest, pid: int) -> dict[str, str]:
    lines = guest.must(f"cat /proc/{pid}/status").splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_the_service_does_everything_in_its_sandbox(mounted: Guest) -> None:
    unit = mounted.show()
    assert (unit["ActiveState"], unit["Type"], unit["NRestarts"]) == ("active", "notify", "0")
    assert unit["StatusText"] == "home, epoch 1, 0 other nodes"
    pids = {
        name: int(json.loads(mounted.must(f"cat /run/mxfs/*/{name}.pid"))[0])
        for name in ("daemon", "fuse", "heartbeat")
    }
    assert pids["daemon"] == int(unit["MainPID"])
    outside = mounted.must("readlink /proc/1/ns/mnt")
    for pid in pids.values():
        assert mounted.must(f"readlink /proc/{pid}/ns/mnt") == outside
        status = _status(mounted, pid)
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    assert int(_status(mounted, pids["heartbeat"])["VmLck"].split()[0]) > 0
    assert "SCHED_FIFO" in mounted.must(f"chrt -p {pids['heartbeat']}")
    environment = mounted.must(f"cat /proc/{pids['fuse']}/environ")
    assert "NOTIFY_SOCKET" not in environment
    # Reservations over SG_IO, and what users may do on a file system.
    assert len(re.findall("0x4d58", mounted.must(f"sg_persist --in --read-keys {DEVICE}"))) == 1
    assert '"pr"' in mounted.must("mxfs status --json | grep fencing")
    mounted.must(
        f"""set -e
        mkdir {MOUNTPOINT}/all; cd {MOUNTPOINT}/all
        mknod fifo p; mknod null c 1 3; mknod none c 250 7; mknod disk b 8 0
        touch file; chmod 6755 file; chown 1000:1000 file; chmod u+s file
        [ $(stat -c %a,%u file) = 4755,1000 ] || [ $(stat -c %a,%u file) = 6755,1000 ]
        setfattr -n user.a -v b file; setfattr -n trusted.a -v b file
        setcap cap_net_raw+ep file 2>/dev/null || setfattr -n security.a -v b file
        chattr +A file; lsattr file | grep -q A; rm file
        setpriv --reuid=1000 --regid=1000 --clear-groups sh -c 'mkdir -p mine 2>/dev/null && exit 1; exit 0'
        mkdir -m 777 open; setpriv --reuid=1000 --regid=1000 --clear-groups sh -c 'echo x >open/mine; mkfifo open/p'
        [ $(stat -c %u,%g open/mine) = 1000,1000 ]
        fallocate -l 1M big; fallocate -p -o 0 -l 4096 big
        dd if=/dev/zero of=big bs=64k count=20 conv=fsync 2>/dev/null
        cp --reflink=auto big copy; flock big true; ln -s big link; ln big hard; mv copy moved
        cd ..; rm -r all"""
    )


def test_a_daemon_that_is_killed_is_followed_by_the_next(mounted: Guest) -> None:
    before = mounted.show()
    mounted.must(f"mkdir {MOUNTPOINT}/killed")
    writer = mounted.node.writer("killed", "n1")
    writer.wait_lines(5, LIMIT_S)
    mounted.must(f"kill -9 {before['MainPID']}")
    after = mounted.restarted(before)
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1
    writer.wait_lines(len(writer.lines()) + 5, LIMIT_S)
    writer.signal(15)
    assert writer.wait(LIMIT_S).code == 0
    mounted.node.check_files("killed", "n1", len(writer.lines()))
    assert re.fullmatch(r"home, epoch \d+, 0 other nodes", after["StatusText"])


def test_a_daemon_whose_loop_stands_still_is_ended_by_the_watchdog(guest: Guest) -> None:
    guest.drop_in(f"WatchdogSec={WATCHDOG_S}")
    guest.mount()
    before = guest.show()
    assert before["WatchdogUSec"] == f"{WATCHDOG_S}s"
    # It is fed as long as the loop runs, and as little as this machine gives it to do.
    guest.must(f"sleep {2 * WATCHDOG_S}; touch {MOUNTPOINT}/still")
    assert guest.show()["MainPID"] == before["MainPID"]
    guest.must(f"kill -STOP {before['MainPID']}")
    after = guest.restarted(before)
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1
    assert f"Watchdog timeout (limit {WATCHDOG_S}s)" in guest.node.machine.console.read_text(errors="replace")
    assert "Fatal Python error: Aborted" in guest.node.log()
    guest.must(f"rm {MOUNTPOINT}/still", LIMIT_S)
    guest.unmount()
    guest.run(f"rm -rf {_DROP_IN}; systemctl daemon-reload")


def test_a_daemon_that_finds_nothing_to_serve_is_no_failure(guest: Guest) -> None:
    """It was killed, and the mount was unmounted before systemd started the next one: that one ends well, once."""
    guest.drop_in("RestartSec=4")
    guest.mount()
    pid = guest.show()["MainPID"]
    guest.must(f"kill -9 {pid}; umount {MOUNTPOINT}", LIMIT_S)
    guest.wait("[ -z \"$(systemctl --no-legend --all list-units 'mxfsd@*')\" ]", "the unit has ended well")
    assert "nothing to serve" in guest.node.log()
    guest.run(f"rm -rf {_DROP_IN}; systemctl daemon-reload")


def test_why_a_mount_failed_is_one_line(guest: Guest) -> None:
    done = guest.run(f"mount -t mxfs -o {OPTIONS},prdev=/dev/zero {DEVICE} {MOUNTPOINT}", LIMIT_S)
    assert (done.code, done.err.strip()) == (32, f"mount.mxfs: {DEVICE}: /dev/zero is no block device")
    assert guest.show() == {}  # neither running nor in the list of failed units
    done = guest.run(f"mount -t mxfs -o {OPTIONS},metrics=1.2.3.4:80 {DEVICE} {MOUNTPOINT}", LIMIT_S)
    assert done.code == 32 and len(done.err.splitlines()) == 1 and "1.2.3.4" in done.err, done.err
