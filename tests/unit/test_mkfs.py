"""mkfs.mxfs and mxfs info on loop devices."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import FakeClock, loop_device, loop_missing, open_lockspace

from mxfs_proto.errors import MisuseError
from mxfs_proto.ondisk import SlotState
from mxfsd import info as info_module
from mxfsd.cli import mkfs
from mxfsd.core.lease import Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import Lockspace

T = Timeouts.named("fast")
needs_loop = pytest.mark.skipif(bool(loop_missing()), reason=loop_missing() or "loop devices work")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    with loop_device(image) as name:
        yield name


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = mkfs.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one line on stderr."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, "")
    assert err.startswith("mkfs.mxfs: ")
    assert err.count("\n") == 1
    return err


def on_clock(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """Let the commands watch slots on a clock of the test's."""

    def opened(path: str, *, readonly: bool = False, check_xfs: bool = True) -> Lockspace:
        return Lockspace(Disk(path, readonly=readonly), check_xfs=check_xfs, clock=clock, sleep=clock.sleep)

    monkeypatch.setattr(Lockspace, "open", opened)


def beginning(device: str) -> tuple[bytes, bytes]:
    """Return what a refused mkfs must not touch: XFS's first sector and the end of the device."""
    with Disk(device, readonly=True) as disk:
        return disk.read(0, 1 << 20), disk.read(disk.size - (1 << 20), 1 << 20)


@needs_loop
def test_makes_a_volume(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, device, "-L", "data", "--", "-i", "size=1024")
    assert (code, err) == (0, "")
    assert "XFS 384 MiB, lockspace 16 MiB" in out
    data = info_module.info(device)
    assert data["uuid"] in out
    assert (data["label"], data["home"], data["epoch"], data["slots"]) == ("data", None, 0, [])
    subprocess.run(["xfs_repair", "-n", device], check=True, capture_output=True)
    assert b"isize=1024" in subprocess.run(["xfs_info", device], check=True, capture_output=True).stdout


@needs_loop
def test_refuses_a_file_system_unless_forced(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, device)[0] == 0
    before = beginning(device)
    first = info_module.info(device)["uuid"]
    assert "holds xfs: use -f" in refusal(capsys, device)
    assert beginning(device) == before
    assert run(capsys, device, "-f", "--lockspace-size", "32M")[0] == 0
    data = info_module.info(device)
    assert data["uuid"] != first
    assert data["lockspace_bytes"] == 32 << 20


@needs_loop
@pytest.mark.parametrize("kind", ["ext4", "swap", "dos"])
def test_refuses_other_contents(device: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "dos":
        entry = bytes(4) + b"\x83" + bytes(3) + (2048).to_bytes(4, "little") + (204800).to_bytes(4, "little")
        table = bytes(446) + entry + bytes(48) + b"\x55\xaa"
        with Disk(device) as disk:
            disk.write(0, table.ljust(4096, b"\0"))
            disk.sync()
    else:
        tool = ["mkfs.ext4", "-q"] if kind == "ext4" else ["mkswap"]
        subprocess.run([*tool, device], check=True, capture_output=True)
    before = beginning(device)
    assert f"holds {kind}" in refusal(capsys, device)
    assert beginning(device) == before


@needs_loop
def test_refuses_a_mounted_device(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, device)[0] == 0
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", "-t", "xfs", device, str(tmp_path / "mnt")], check=True)
    try:
        assert f"mounted at {tmp_path}/mnt: unmount it" in refusal(capsys, device, "-f")
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


@needs_loop
def test_refuses_a_device_in_use(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Disk(device, exclusive=True):
        assert "something on this host uses it" in refusal(capsys, device)


@needs_loop
def test_refuses_a_device_that_a_node_uses(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter moves while mkfs looks; -f does not help. A node that left is no obstacle."""
    assert run(capsys, device)[0] == 0
    clock = FakeClock()
    space = open_lockspace(device, clock)
    record = space.claim_slot(Joiner(b"m" * 16, "n7"), T).record

    def beat() -> None:
        found = space.read_slots()[0]
        assert found is not None
        space.write_slot(replace(found, counter=found.counter + 1))

    clock.on_sleep = beat
    on_clock(monkeypatch, clock)
    before = space.header
    assert "in use by node 'n7' (slot 1): unmount it there first" in refusal(capsys, device, "-f")
    assert space.release_slot(record, SlotState.LEFT)
    monkeypatch.undo()
    with Lockspace.open(device, readonly=True).disk as disk:
        assert Lockspace(disk).header == before
    space.close()
    assert run(capsys, device, "-f")[0] == 0


@needs_loop
def test_refuses_a_small_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "small.img"
    with open(image, "wb") as file:
        file.truncate(310 << 20)
    with loop_device(image) as device:
        assert "too small" in refusal(capsys, device)
        assert "at least 316 MiB" in refusal(capsys, device)


@needs_loop
def test_refuses_a_read_only_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "ro.img"
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    with loop_device(image, "--read-only") as device:
        assert "is read-only" in refusal(capsys, device)


@needs_loop
def test_bad_mkfs_xfs_option_changes_nothing(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, device)[0] == 0
    before = beginning(device)
    assert "-d size option respecified" in refusal(capsys, device, "-f", "--", "-d", "size=300m")
    assert "-N" in refusal(capsys, device, "-f", "--", "-N")
    assert "logdev" in refusal(capsys, device, "-f", "--", "-l", "logdev=/dev/null")
    assert beginning(device) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="as another user the missing rights would be named first")
def test_refuses_what_is_no_block_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "regular file: attach it with losetup" in refusal(capsys, str(tmp_path / "file"))
    assert "not a block device" in refusal(capsys, "/dev/null")
    assert "No such file" in refusal(capsys, str(tmp_path / "nothing"))


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "longer than 12 bytes" in refusal(capsys, "/dev/null", "-L", "thirteen byte")
    assert "lockspace size" in refusal(capsys, "/dev/null", "--lockspace-size", "100K")
    assert "not a size" in refusal(capsys, "/dev/null", "--lockspace-size", "big")
    with pytest.raises(SystemExit) as caught:
        mkfs.main([])
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("text", "size"), [("16M", 16 << 20), ("1g", 1 << 30), ("4096", 4096), ("2KiB", 2048), ("3mb", 3 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert mkfs.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1T", "-1", "1.5G", "0x10", "1MK"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(MisuseError):
        mkfs.parse_size(text)


@needs_loop
def test_info_text_and_json(device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, device)[0] == 0
    clock = FakeClock()
    space = open_lockspace(device, clock)
    record = space.claim_slot(Joiner(b"m" * 16, "n7"), T).record
    space.claim_lease(record, T)
    space.close()
    # The node does not beat: info looks for two periods.
    on_clock(monkeypatch, clock)
    began = clock.ms
    assert info_module.main_info([device, "--json"]) == 0
    assert 2 * T.heartbeat_ms < clock.ms - began < 8 * T.heartbeat_ms
    data = json.loads(capsys.readouterr().out)
    assert (data["home"], data["epoch"], data["lease"]) == ({"slot": 1, "node": "n7"}, 1, "HELD")
    (slot,) = data["slots"]
    assert (slot["slot"], slot["node"], slot["state"], slot["moves"]) == (1, "n7", "CLAIMING", False)
    assert info_module.main_info([device]) == 0
    text = capsys.readouterr().out
    assert "home       slot 1 (n7)" in text
    assert "1     n7" in text


def test_info_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    assert info_module.main_info([str(tmp_path / "file")]) == 1
    assert "no MXFS volume" in capsys.readouterr().err
