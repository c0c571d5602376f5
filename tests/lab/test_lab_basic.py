"""The lab itself: what it makes and removes, its commands, a crash that is one, and several labs at once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import NATIVE, scratch_dir

from mxfsd import mountinfo, options, procs, xfsprogs
from mxfsd.lab import disk, lab, net, state

pytestmark = [pytest.mark.needs("root", "fuse", "loop", "xfs", "netns"), pytest.mark.needs_lab]

MULTICAST = "239.255.77.88"
RECEIVE = f"""
import socket, struct
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 7788))
group = socket.inet_aton("{MULTICAST}") + socket.inet_aton("0.0.0.0")
sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
sock.settimeout(10)
print("listening", flush=True)
print(sock.recvfrom(100), flush=True)
"""
SEND = f"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.sendto(b"hello", ("{MULTICAST}", 7788))
"""


def mxfs(*words: str | Path, code: int = 0) -> str:
    """Run ``mxfs``; return its output (the error output if *code* is not 0)."""
    done = subprocess.run(
        [sys.executable, "-m", "mxfsd.cli.mxfs", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def _inside(lab_id: str, name: str, code: str) -> subprocess.Popen[str]:
    # --mount= keeps this mount namespace, as the lab's own setns does.
    where = f"--net={net.path_of(net.namespace(lab_id, name))}"
    return subprocess.Popen(["nsenter", where, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def network() -> Iterator[str]:
    """Three nodes' namespaces and a bridge, without any node."""
    lab_id = state.lab_id(Path(f"/pytest/{os.getpid()}"))
    net.build(lab_id, 3)
    yield lab_id
    net.remove(lab_id)
    assert net.existing(lab_id) == []


def _hears(lab_id: str, sender: str, receiver: str) -> bool:
    with _inside(lab_id, receiver, RECEIVE) as hearing:
        assert hearing.stdout is not None
        assert hearing.stdout.readline() == "listening\n"
        with _inside(lab_id, sender, SEND) as sending:
            sending.wait(10)
        if net.link_is_up(lab_id, int(sender[1:])):
            return f"b'hello', ('10.77.1.{sender[1:]}'" in hearing.stdout.readline()
        hearing.kill()
        return False


def test_multicast_reaches_other_nodes_before_and_after_a_partition(network: str) -> None:
    assert _hears(network, "n1", "n2")
    assert _hears(network, "n3", "n1")
    net.set_link(network, 3, False)
    assert not net.link_is_up(network, 3)
    assert not _hears(network, "n3", "n1")
    assert _hears(network, "n1", "n2")
    net.set_link(network, 3, True)
    assert _hears(network, "n3", "n1")


def test_the_hosts_own_network_is_not_touched() -> None:
    before = sorted(name for _, name in socket.if_nameindex())
    lab_id = state.lab_id(Path(f"/pytest/host/{os.getpid()}"))
    net.build(lab_id, 2)
    try:
        assert sorted(name for _, name in socket.if_nameindex()) == before
        assert net.existing(lab_id) == [net.namespace(lab_id, name) for name in ("br", "n1", "n2")]
    finally:
        net.remove(lab_id)


def test_loop_devices_of_one_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.make_image(image, 64 << 20)
    first, second = disk.attach(image), disk.attach(image)
    assert first != second
    assert sorted(disk.loops_of(image)) == sorted([first, second])
    assert disk.backing(first) == str(image)
    disk.detach(first, image)
    disk.detach(second, image)
    assert disk.loops_of(image) == []
    disk.detach(first, image)  # again, without harm to whoever has that device now


def test_a_damaged_file_system_is_reported(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    disk.make_image(image, 320 << 20)
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, preexec_fn=xfsprogs.hide_fuse_mounts)
    assert disk.check(image) == ""
    with open(image, "r+b") as file:
        file.seek(512)  # the free-space header (AGF) of the first group, sector 1
        file.write(b"\xff" * 512)
    assert "AGF" in disk.check(image) or "agf" in disk.check(image)


@pytest.mark.parametrize(
    ("text", "size"), [("2G", 2 << 30), ("512M", 512 << 20), ("300mib", 300 << 20), ("4096", 4096), ("1TB", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert disk.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "2X", "-1G", "1.5G", "0", "²G"])
def test_no_sizes(tmp_path: Path, text: str) -> None:
    assert "not a size" in mxfs("lab", "up", tmp_path / "x", f"--size={text}", code=1)
    assert not (tmp_path / "x").exists()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    place = tmp_path / "x"
    for words, reason in (
        (["status", place], "no lab is here; start one with mxfs lab up"),
        (["down", place], "no lab is here"),
        (["kill", place, "n1"], "no lab is here"),
        (["up", place, "--nodes", "0"], "0 nodes: a lab has 1 to 64"),
        (["up", place, "--size", "20M"], "too small"),
        (["up", place, "-o", "colour=red"], "unknown option colour=red"),
    ):
        said = mxfs("lab", *words, code=1)
        assert reason in said
        assert said.count("\n") == 1
        assert not place.exists()
    assert net.existing(state.lab_id(place)) == []


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "n2").mkdir()
    (tmp_path / "n2" / "precious").touch()
    assert "n2 is in the way" in mxfs("lab", "up", tmp_path, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["n2"]
    assert (tmp_path / "n2" / "precious").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A lab of two nodes; afterwards nothing of it may be left."""
    assert not NATIVE
    folder = scratch_dir("mxfs-lab-basic-")
    mxfs("lab", "up", folder, "--nodes", "2", "--size", "600M")
    yield folder
    mxfs("lab", "down", folder)
    assert [path.name for path in folder.iterdir()] == ["disk.img"]
    assert net.existing(state.lab_id(folder)) == []
    assert disk.loops_of(folder / "disk.img") == []
    assert procs.marked(state.Paths(folder).mark("n1")) == []
    (folder / "disk.img").unlink()
    folder.rmdir()


def _status(folder: Path) -> dict[str, dict[str, object]]:
    status = json.loads(mxfs("lab", "status", folder, "--json"))
    return {"all": status, **{node["name"]: node for node in status["nodes"]}}


def test_status(cluster: Path) -> None:
    status = _status(cluster)
    assert status["all"]["home"] == "n1"
    assert status["all"]["epoch"] == 1
    assert [status[name]["state"] for name in ("n1", "n2")] == ["up", "up"]
    assert "home n1, epoch 1" in mxfs("lab", "status", cluster)
    assert "a lab is here already" in mxfs("lab", "up", cluster, code=1)
    assert "no such node; the lab has n1, n2" in mxfs("lab", "stop", cluster, "n9", code=1)


def test_exec_runs_in_the_nodes_network_and_folder(cluster: Path) -> None:
    assert mxfs("lab", "exec", cluster, "n2", "--", "pwd") == f"{cluster}/n2\n"
    assert "10.77.1.2/24" in mxfs("lab", "exec", cluster, "n2", "--", "ip", "-br", "addr", "show", "dev", "eth0")
    mxfs("lab", "exec", cluster, "n1", "--", "sh", "-c", "echo one > shared")
    assert mxfs("lab", "exec", cluster, "n2", "--", "cat", "shared") == "one\n"
    mxfs("lab", "exec", cluster, "n2", "--", "sh", "-c", "exit 7", code=7)
    assert "nosuch: No such file" in mxfs("lab", "exec", cluster, "n2", "--", "nosuch", code=127)
    assert "no command" in mxfs("lab", "exec", cluster, "n2", code=2)


def test_home_moves_and_comes_back(cluster: Path) -> None:
    epoch = int(str(_status(cluster)["all"]["epoch"]))
    for number, name in enumerate(("n2", "n1"), 1):
        mxfs("lab", "move-home", cluster, name)
        status = _status(cluster)["all"]
        assert (status["home"], status["epoch"]) == (name, epoch + number)


def test_stop_and_start(cluster: Path) -> None:
    with open(cluster / "n2" / "held", "w"):
        said = mxfs("lab", "stop", cluster, "n2", code=1)
    assert f"n2 is busy, {cluster}/n2 is held by" in said
    assert str(os.getpid()) in said
    mxfs("lab", "stop", cluster, "n2")
    assert mountinfo.at(str(cluster / "n2")) is None
    assert procs.marked(state.Paths(cluster).mark("n2")) == []
    assert "n2 is not up but stopped" in mxfs("lab", "stop", cluster, "n2", code=1)
    assert _status(cluster)["n2"]["state"] == "stopped"
    mxfs("lab", "start", cluster, "n2")
    assert "n2 is up already" in mxfs("lab", "start", cluster, "n2", code=1)
    assert (cluster / "n2" / "held").exists()


def test_partition_and_heal(cluster: Path) -> None:
    mxfs("lab", "partition", cluster, "n2")
    try:
        assert _status(cluster)["n2"]["partitioned"] is True
        assert not net.link_is_up(state.lab_id(cluster), 2)
    finally:
        mxfs("lab", "heal", cluster, "n2")
    assert _status(cluster)["n2"]["partitioned"] is False
    assert net.link_is_up(state.lab_id(cluster), 2)


def test_another_lab_at_the_same_time(cluster: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mxfs("lab", "up", other, "--nodes", "1", "--size", "400M")
    (other / "n1" / "mine").touch()
    assert not (cluster / "n1" / "mine").exists()
    mxfs("lab", "down", other)
    assert _status(cluster)["n1"]["state"] == "up"
    # The disk stays, with what is on it.
    mxfs("lab", "up", other, "--nodes", "1")
    assert (other / "n1" / "mine").exists()
    mxfs("lab", "down", other, "--purge")
    assert list(other.iterdir()) == []


def test_nodes_that_were_killed_come_back_with_devices_of_their_own(tmp_path: Path) -> None:
    """The device that one of them had is free, and may be what another one is given."""
    place = tmp_path / "all"
    mxfs("lab", "up", place, "--nodes", "2", "--size", "400M")
    for name in ("n1", "n2"):
        mxfs("lab", "kill", place, name)
    for name in ("n2", "n1"):
        mxfs("lab", "start", place, name)
    status = _status(place)
    assert status["n1"]["loop"] != status["n2"]["loop"]
    mxfs("lab", "down", place, "--purge")


def test_kill_is_a_crash(tmp_path: Path) -> None:
    """Of the only node, so that nothing replays the log before we look: XFS did not unmount cleanly."""
    place = tmp_path / "crash"
    mxfs("lab", "up", place, "--nodes", "1", "--size", "400M")
    mxfs(
        "lab",
        "exec",
        place,
        "n1",
        "--",
        "sh",
        "-c",
        "echo kept > kept; sync kept; for i in $(seq 50); do : > f$i; done",
    )
    sleeper = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mxfsd.cli.mxfs",
            "lab",
            "exec",
            str(place),
            "n1",
            "--",
            "sh",
            "-c",
            "exec sleep 600 > held",
        ]
    )
    assert procs.wait_until(lambda: (place / "n1" / "held").exists(), 10)
    mxfs("lab", "kill", place, "n1")
    assert sleeper.wait(10) == -9
    assert procs.marked(state.Paths(place).mark("n1")) == []
    assert mountinfo.at(str(place / "n1")) is None
    assert disk.loops_of(place / "disk.img") == []
    assert disk._DIRTY_LOG in disk._repair(place / "disk.img")
    assert "n1 is not up but dead" in mxfs("lab", "kill", place, "n1", code=1)
    assert _status(place)["n1"]["state"] == "dead"
    mxfs("lab", "start", place, "n1")
    assert mxfs("lab", "exec", place, "n1", "--", "cat", "kept") == "kept\n"
    mxfs("lab", "kill", place, "n1")
    mxfs("lab", "down", place)  # replays the log itself before it checks


def test_down_ends_what_exec_left_and_refuses_what_others_hold(tmp_path: Path) -> None:
    place = tmp_path / "busy"
    mxfs("lab", "up", place, "--nodes", "1", "--size", "400M")
    mxfs("lab", "exec", place, "n1", "--", "sh", "-c", "sleep 600 > held 2>&1 &")
    with open(place / "n1" / "held"):
        assert "n1 is busy" in mxfs("lab", "down", place, code=1)
    assert _status(place)["n1"]["state"] == "up"
    mxfs("lab", "down", place)


def test_a_daemon_that_hangs_does_not_stop_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "UMOUNT_S", 1.0)
    monkeypatch.setattr(lab, "LEAVE_S", 1.0)
    monkeypatch.setattr(lab, "STATUS_S", 0.5)
    place = tmp_path / "hang"
    cluster = lab.Lab(place)
    cluster.up(1, 400 << 20)
    for pid in procs.marked(cluster.paths.mark("n1")):
        procs.send(pid, 19, lambda _: True)  # SIGSTOP
    assert cluster.status()["nodes"][0]["state"] == "silent"
    with pytest.raises(lab.IoFailure, match="n1 was killed"):
        cluster.down()
    assert disk.loops_of(place / "disk.img") == []
    assert net.existing(state.lab_id(place)) == []
    cluster.down()  # removes the logs that the first one kept
    assert [path.name for path in place.iterdir()] == ["disk.img"]


def test_a_failed_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_words: object, **_more: object) -> None:
        raise lab.IoFailure("the daemon is shy")

    monkeypatch.setattr(lab, "mount_volume", fails)
    place = tmp_path / "shy"
    with pytest.raises(lab.IoFailure, match="shy"):
        lab.Lab(place).up(2, 400 << 20)
    assert not place.exists()
    assert net.existing(state.lab_id(place)) == []


def test_the_daemon_of_a_node_gets_the_nodes_options(cluster: Path) -> None:
    record = json.loads((cluster / ".lab" / "lab.json").read_text())
    argv = Path(f"/proc/{record['nodes'][1]['pid']}/cmdline").read_bytes().decode().split("\0")
    parsed = options.parse(argv[argv.index("--options") + 1])
    assert (parsed.node, parsed.timeouts, parsed.state) == ("n2", "fast", str(state.Paths(cluster).run_link("n2")))
