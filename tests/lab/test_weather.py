"""Weather on real mounts: a network that works one way only, a slow disk, none at all, damaged records."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from labkit import Lab, must, mxfs_command, running_lab, scratch_dir
from test_home_move import Load

from mxfs_proto.ondisk import HEADER_RECORD, LEASE_RECORDS, RECORD_BYTES, slot_record
from mxfsd import control, info, procs
from mxfsd.lab.net import namespace
from mxfsd.lab.state import lab_id
from tests.hangfs import HangingDisk, hanging_disk

pytestmark = pytest.mark.needs_lab
Work = dict[str, Path]

SERVE_S = 40.0


def state_of(lab: Lab, name: str) -> dict[str, object]:
    """What the daemon of a node says of itself; nothing where it does not answer."""
    for folder in (lab.folder / ".lab" / name / "run").glob("*-*-*"):
        try:
            return control.request(folder / control.SOCKET_NAME, "status", 3.0)
        except Exception:  # noqa: BLE001 (whatever is wrong: it does not serve)
            return {}
    return {}


def serving(lab: Lab, *names: str) -> bool:
    return all(state_of(lab, name).get("state") == "serving" for name in names or lab.names)


def incarnations(lab: Lab) -> dict[str, int]:
    """Of each node: one more means that it was put out, or began anew."""
    found = info.info(str(lab.folder / "disk.img"))
    assert not found["unreadable"], found
    return {slot["node"]: slot["incarnation"] for slot in found["slots"]}


@contextmanager
def deaf(lab: Lab, name: str) -> Iterator[None]:
    """Let nothing that is sent to a node alone reach it; what it sends arrives."""
    number = int(name[1:])
    bridge, node = (namespace(lab_id(lab.folder), which) for which in ("br", name))
    address = must(["ip", "netns", "exec", node, "cat", "/sys/class/net/eth0/address"]).stdout.strip()
    must(["ip", "-n", bridge, "link", "add", f"void{number}", "type", "veth", "peer", "name", f"end{number}"])
    try:
        must(["ip", "-n", bridge, "link", "set", f"end{number}", "up"])
        must(["ip", "-n", bridge, "link", "set", f"void{number}", "master", "br0", "up"])
        must(["bridge", "-n", bridge, "fdb", "replace", address, "dev", f"void{number}", "master", "static", "sticky"])
        yield
    finally:
        must(["ip", "-n", bridge, "link", "delete", f"void{number}"])


def test_the_way_to_a_node_can_be_closed(lab: Lab) -> None:
    """That it is one way only, and open again afterwards: else the tests below would prove nothing."""
    from mxfsd.lab.net import address

    home, other = lab.home(), lab.others()[0]
    bridge = namespace(lab_id(lab.folder), "br")

    def frames(name: str) -> int:
        statistics = f"/sys/class/net/n{name[1:]}/statistics/tx_packets"  # towards the node
        return int(must(["ip", "netns", "exec", bridge, "cat", statistics]).stdout)

    def ping() -> int:
        probe = (
            "import socket,sys; s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
            f"[s.sendto(b'x'*50, ('{address(int(other[1:]))}', 9)) for _ in range(200)]"
        )
        before = frames(other)
        lab.execute(home, "python3", "-c", probe)
        return frames(other) - before

    assert ping() >= 200
    with deaf(lab, other):
        assert ping() < 200
    assert ping() >= 200


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", ["client", "home"])
def test_one_way_loss_for_a_while(lab: Lab, work: Work, which: str) -> None:
    """Shorter than anybody may be put out for: programs see a pause, and everybody goes on as the same incarnation."""
    victim = lab.home() if which == "home" else lab.others()[0]
    before = incarnations(lab)
    load = Load(work)
    with load.running():
        load.wait_for_work(10)
        with deaf(lab, victim):
            time.sleep(1.5)
        load.wait_for_work(20)
    assert load.errors == []
    load.check()
    assert incarnations(lab) == before


@pytest.mark.timeout(300)
def test_a_node_that_hears_nothing_is_put_out(lab: Lab, work: Work) -> None:
    """The others go on; its own programs get errors, not old data, and a new mount serves again."""
    victim, other = lab.others()
    home = lab.home()
    (work[victim] / "known").write_text("old")
    assert (work[victim] / "known").read_text() == "old"
    with deaf(lab, victim):
        (work[other] / "known").write_text("new")  # waits until the victim can cache nothing any more
        assert (work[home] / "known").read_text() == "new"
        try:
            assert (work[victim] / "known").read_text() == "new"
        except OSError:
            pass
        assert procs.wait_until(lambda: not state_of(lab, victim), SERVE_S), "it goes on as if it were in the volume"
    subprocess.run(["umount", "-l", lab[victim]], check=False)
    lab.ended(victim)
    lab.start(victim)
    assert (work[victim] / "known").read_text() == "new"
    (work[victim] / "known").write_text("newer")
    assert (work[other] / "known").read_text() == "newer"


# -- the disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def lab_on_a_hanging_disk() -> Iterator[tuple[Lab, HangingDisk]]:
    """A lab whose disk.img is a file that can stop to answer."""
    source, folder = scratch_dir("mxfs-disk-"), scratch_dir("mxfs-lab-")
    with open(source / "disk.img", "wb") as image:
        image.truncate(1 << 30)
    loop = must(["losetup", "--find", "--show", source / "disk.img"]).stdout.strip()
    try:
        must([mxfs_command("mkfs.mxfs"), loop])
    finally:
        must(["losetup", "--detach", loop])
    (folder / "disk.img").touch()
    try:
        with ExitStack() as stack:
            disk = stack.enter_context(hanging_disk(source, source.with_suffix(".slow")))
            # As a file of the folder and not as a link to it: loop devices are known by their path.
            must(["mount", "--bind", disk.folder / "disk.img", folder / "disk.img"])
            stack.callback(must, ["umount", folder / "disk.img"])
            lab = stack.enter_context(running_lab(folder=folder))
            stack.callback(disk.go_on)
            yield lab, disk
    finally:
        shutil.rmtree(source, ignore_errors=True)
        source.with_suffix(".slow").rmdir()
    shutil.rmtree(folder)


def work_of(lab: Lab) -> Work:
    os.mkdir(lab["n1"] / "work")
    return {name: root / "work" for name, root in lab.nodes.items()}


@pytest.fixture(scope="module")
def hanging() -> Iterator[tuple[Lab, HangingDisk]]:
    with lab_on_a_hanging_disk() as both:
        yield both


@pytest.mark.timeout(300)
def test_slow_disk(hanging: tuple[Lab, HangingDisk]) -> None:
    """Every I/O waits up to 0.4 s, again and again: slow is not dead. Nobody is put out, no program sees an error."""
    lab, disk = hanging
    before = incarnations(lab)
    load = Load(work_of(lab))
    with load.running():
        load.wait_for_work(10)
        for _ in range(15):
            disk.hang()
            time.sleep(0.4)
            disk.go_on()
            time.sleep(0.1)
        load.wait_for_work(10)
    assert load.errors == []
    load.check()
    assert incarnations(lab) == before


@pytest.mark.timeout(300)
def test_no_node_reaches_the_disk(hanging: tuple[Lab, HangingDisk]) -> None:
    """Longer than a node is dead for. All are frozen, nobody is put out for it, and what was synced is there."""
    lab, disk = hanging
    assert procs.wait_until(lambda: serving(lab), SERVE_S), lab.logs()
    for name in lab.names:
        with open(lab[name] / f"{name}.synced", "wb", buffering=0) as file:
            file.write(name.encode() * 1000)
            os.fsync(file.fileno())
    home, slots = lab.home(), incarnations(lab)
    disk.hang()
    try:
        time.sleep(6)
    finally:
        disk.go_on()
    assert procs.wait_until(lambda: serving(lab), SERVE_S), lab.logs()
    for name in lab.names:
        for other in lab.names:
            assert (lab[name] / f"{other}.synced").read_bytes() == other.encode() * 1000
        (lab[name] / f"{name}.after").write_text(name)
    for name in lab.names:
        assert sorted(path.name for path in lab[name].glob("*.after")) == [f"{other}.after" for other in lab.names]
    after = incarnations(lab)
    assert {n: i for n, i in after.items() if n != home} == {n: i for n, i in slots.items() if n != home}
    assert after[home] - slots[home] <= 1, "the home's XFS was shut down in time: its daemon began anew, once"


# -- damaged records ---------------------------------------------------------------------------------------------------


def damage(image: Path, offset: int, how: str) -> bytes:
    """Spoil one record of the lockspace under everybody's feet; return what was there."""
    fd = os.open(image, os.O_RDWR)
    try:
        before = os.pread(fd, RECORD_BYTES, offset)
        spoilt = bytearray(before)
        if how == "torn":
            spoilt[512:1024] = os.urandom(512)
        else:
            spoilt[100] ^= 0x10
        os.pwrite(fd, spoilt, offset)
        os.fsync(fd)
        return before
    finally:
        os.close(fd)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["torn", "bit flipped"])
def test_damaged_records(lab: Lab, work: Work, how: str) -> None:
    """Slots of live nodes, the lease, a free slot: what its owner writes is whole again, and nobody takes a record that
    makes no sense for anything but unchanged. A copy of the header is reported, and the other one used."""
    image = lab.folder / "disk.img"
    found = info.info(str(image))
    base, end = found["lockspace_offset"], found["lockspace_offset"] + found["lockspace_bytes"]
    used = {slot["node"]: slot["slot"] for slot in found["slots"]}
    free = next(number for number in range(60, 1, -1) if number not in used.values())
    before = {slot["node"]: slot["incarnation"] for slot in found["slots"]}
    epoch = lab.status()["epoch"]
    load = Load(work)
    header = b""
    try:
        with load.running():
            load.wait_for_work(10)
            for _ in range(3):
                for number in used.values():
                    damage(image, base + slot_record(number) * RECORD_BYTES, how)
                for number in LEASE_RECORDS:
                    damage(image, base + number * RECORD_BYTES, how)
                    time.sleep(1.0)  # a renewal writes one of the two
            taken = damage(image, base + slot_record(free) * RECORD_BYTES, how)
            header = damage(image, base + HEADER_RECORD * RECORD_BYTES, how)
            load.wait_for_work(20)
        assert load.errors == []
        load.check()
        seen = info.info(str(image))
        assert list(seen["unreadable"]) == [str(free)]
        assert {slot["node"]: slot["incarnation"] for slot in seen["slots"]} == before
        assert lab.status()["epoch"] == epoch
        # A node that mounts meanwhile finds its way too.
        other = lab.others()[0]
        lab.stop(other)
        lab.start(other)
        assert (lab[other] / work[other].name / "log").exists()
    finally:
        with open(image, "r+b") as file:
            if header:
                file.seek(base + HEADER_RECORD * RECORD_BYTES)
                file.write(header)
                file.seek(base + slot_record(free) * RECORD_BYTES)
                file.write(taken)
    assert end > base
