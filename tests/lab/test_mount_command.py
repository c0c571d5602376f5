"""mount(8) and umount(8) with type mxfs, as a user and fstab call them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mxfsd import mountinfo, procs
from mxfsd.cli import install
from mxfsd.lab import disk

pytestmark = [pytest.mark.needs("root", "fuse", "loop", "xfs"), pytest.mark.needs_lab]


@dataclass
class Host:
    """One node on this host: a volume on a loop device, a mount point and a run root of its own."""

    loop: str
    uuid: str
    dir: Path
    run_root: Path

    def mount(self, *words: str, options: str = "", code: int = 0) -> str:
        """Run mount(8); return what it printed on standard error."""
        every = ",".join(filter(None, [f"state={self.run_root},timeouts=fast", options]))
        return _run(["mount", "-t", "mxfs", "-o", every, *words], code)

    def umount(self) -> None:
        """Run umount(8) and wait until the daemon is gone."""
        _run(["umount", str(self.dir)])
        assert procs.wait_until(lambda: not self.daemons(), 20)

    def daemons(self) -> list[int]:
        """The processes that work for this host's run root."""
        mark = f"MXFS_TEST_HOST={self.run_root}"
        return [pid for pid in procs.marked(mark) if procs.has_variable(pid, "MXFS_DAEMON")]


def _run(argv: list[str], code: int = 0) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def helper() -> Iterator[None]:
    """mount.mxfs where mount(8) looks for it, for the time of this module, unless it is installed already."""
    if Path("/sbin/mount.mxfs").exists():
        yield
        return
    install.install()
    yield
    install.uninstall()
    assert not os.path.lexists("/sbin/mount.mxfs")


@pytest.fixture
def host(helper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    image = tmp_path / "disk.img"
    disk.make_image(image, 400 << 20)
    loop = disk.attach(image)
    _run([sys.executable, "-m", "mxfsd.cli.mkfs", loop])
    uuid = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "UUID", loop], capture_output=True, text=True, check=True
    ).stdout.strip()
    short = Path(tempfile.mkdtemp(prefix="mxfs-", dir="/run"))  # the names of sockets below it are limited
    made = Host(loop, uuid, tmp_path / "mnt", short / "run")
    made.dir.mkdir()
    monkeypatch.setenv("MXFS_TEST_HOST", str(made.run_root))
    yield made
    if mountinfo.at(str(made.dir)) is not None:
        made.umount()
    shutil.rmtree(short)
    disk.detach(loop, image)
    assert disk.check(image) == ""


def test_mount_write_unmount_mount_read(host: Host) -> None:
    host.mount(host.loop, str(host.dir))
    mount = mountinfo.at(str(host.dir))
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.mxfs", host.loop)
    (host.dir / "f").write_text("kept")
    host.umount()
    assert list(host.dir.iterdir()) == []
    host.mount(f"UUID={host.uuid}", str(host.dir))
    assert (host.dir / "f").read_text() == "kept"


def test_from_fstab(host: Host, tmp_path: Path) -> None:
    table = tmp_path / "fstab"
    options = f"noauto,_netdev,nofail,x-systemd.automount,nodev,state={host.run_root},timeouts=fast"
    table.write_text(f"UUID={host.uuid} {host.dir} mxfs {options} 0 0\n")
    _run(["mount", "-T", str(table), str(host.dir)])
    (host.dir / "f").touch()


def test_read_only_writes_nothing(host: Host) -> None:
    host.mount(host.loop, str(host.dir), options="ro")
    with pytest.raises(OSError, match="Read-only"):
        (host.dir / "f").touch()


def test_a_second_mount_is_refused_and_the_first_goes_on(host: Host, tmp_path: Path) -> None:
    host.mount(host.loop, str(host.dir))
    other = tmp_path / "other"
    other.mkdir()
    said = host.mount(host.loop, str(other), code=32)
    assert f"mount.mxfs: {host.loop}: the volume is mounted at {host.dir} already" in said
    # Another run root does not know of the first one's daemon; the device does.
    said = _run(["mount", "-t", "mxfs", "-o", f"state={host.run_root}2", host.loop, str(other)], 32)
    assert f"mount.mxfs: {host.loop}: is mounted at {host.dir} already" in said
    said = host.mount(host.loop, str(host.dir), code=32)
    assert "is mounted there already" in said
    assert list(Path(f"{host.run_root}2").glob("*")) == []
    (host.dir / "f").touch()


def test_a_volume_mounted_as_plain_xfs_is_refused(host: Host, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    _run(["mount", "-t", "xfs", host.loop, str(other)])
    try:
        assert f"is mounted at {other} already (type xfs)" in host.mount(host.loop, str(host.dir), code=32)
    finally:
        _run(["umount", str(other)])
    assert mountinfo.at(str(host.dir)) is None
    assert not host.run_root.exists()


def test_a_busy_mount_stays(host: Host) -> None:
    host.mount(host.loop, str(host.dir))
    with open(host.dir / "f", "w") as file:
        assert "busy" in _run(["umount", str(host.dir)], 32)
        file.write("still here")
    assert (host.dir / "f").read_text() == "still here"
