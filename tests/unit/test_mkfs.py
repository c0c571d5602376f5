"""mkfs.mxfs and mxfs info on loop devices."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diskimage import FakeClock, loop_device, open_lockspace

from mxfs_proto.errors import IoFailure, MediaError, MisuseError
from mxfs_proto.ondisk import SlotState
from mxfsd import info as info_module
from mxfsd import xfsprogs
from mxfsd.cli import device as device_module
from mxfsd.cli import mkfs
from mxfsd.core.lease import Joiner
from mxfsd.core.timeouts import Timeouts
from mxfsd.io.disk import Disk
from mxfsd.io.lockspace import Lockspace

T = Timeouts.named("fast")
needs_loop = pytest.mark.needs("root", "loop", "xfs")


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
        assert f"is mounted at {tmp_path}/mnt already (type xfs): unmount it" in refusal(capsys, device, "-f")
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


@needs_loop
def test_refuses_a_device_in_use(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Disk(device, exclusive=True):
        assert "is in use on this host" in refusal(capsys, device)


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
    assert info_module.main_info([str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err == f"mxfs info: cannot open {tmp_path}/absent: No such file or directory\n"
    with pytest.raises(SystemExit) as caught:
        info_module.main_info([])
    assert caught.value.code == 2


@needs_loop
def test_mkfs_xfs_is_missing_or_fails(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it fails after the dry run, the old contents are gone, and that is said."""
    assert run(capsys, device)[0] == 0
    before = beginning(device)
    tool = tmp_path / "mkfs.xfs"
    monkeypatch.setattr(xfsprogs.shutil, "which", lambda _name: str(tool))
    assert f"cannot run {tool}: No such file or directory: install xfsprogs" in refusal(capsys, device, "-f")
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    assert "mkfs.xfs would fail: exit code 3: check the options after --" in refusal(capsys, device, "-f")
    assert beginning(device) == before
    tool.write_text('#!/bin/sh\n[ "$3" = -N ] && exit 0\necho "pwrite: Input/output error" >&2\nexit 1\n')
    said = refusal(capsys, device, "-f")
    assert "mkfs.xfs failed: pwrite: Input/output error; the device holds no usable volume now" in said
    with pytest.raises(MediaError):
        Lockspace.open(device)


@needs_loop
def test_an_xfs_of_another_size_is_no_volume(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, device, "--", "-d", "agcount=2", "-N") + refusal(capsys, device, "--", "-d", "size=1g")
    assert "-N" in said and "size" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mkfs, "XFS_MIN_BYTES", 0)
        real = mkfs.mkfs_xfs

        def larger(name: str, size: int, label: str, extra: list[str], *, dry_run: bool) -> None:
            real(name, size + (8 << 20), label, extra, dry_run=dry_run)

        patch.setattr(mkfs, "mkfs_xfs", larger)
        said = refusal(capsys, device)
    assert "mkfs.xfs made a file system of 411041792 bytes instead of 402653184; the device holds no usable" in said


@needs_loop
def test_others_have_reserved_the_device(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkfs.mxfs and mxfs info say what RESERVATION CONFLICT means."""

    def conflict(_disk: Disk, _offset: int, _length: int) -> bytes:
        raise IoFailure("Invalid exchange", errno.EBADE)

    monkeypatch.setattr(Disk, "read", conflict)
    assert f"{device} is reserved by others and does not let this host read" in refusal(capsys, device)
    assert info_module.main_info([device]) == 1
    assert f"mxfs info: {device} is reserved by others" in capsys.readouterr().err


@needs_loop
def test_a_device_that_does_not_open(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_fd: int) -> bool:
        raise OSError(errno.ENXIO, "No such device or address")

    monkeypatch.setattr(device_module, "is_read_only", broken)
    assert f"{device}: No such device or address: check that the device works" in refusal(capsys, device)


@needs_loop
def test_only_root_formats(device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert f"{device}: only root can format a device: use sudo" in refusal(capsys, device)
