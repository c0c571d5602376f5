"""mount.mxfs: its command line, its checks, and a daemon that is ready, fails, dies or is silent."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diskimage import loop_device

from mxfs_proto.errors import IoFailure, MxfsError
from mxfs_proto.ondisk import DeviceTooSmall, OtherVersion, TornRecord
from mxfsd import admission, mountinfo, procs, spawn
from mxfsd.cli import mount, systemd
from mxfsd.cli.mount import MountError, parse_arguments
from mxfsd.options import MountOptions, parse

STUB = """
import os, sys, time
fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
def say(line):
    os.write(fd, line.encode()); os.close(fd)
"""


def test_the_way_mount_calls_it() -> None:
    arguments = parse_arguments(["/dev/sdb", "/mnt", "-s", "-n", "-o", "rw,noatime", "-o", "port=7", "-v"])
    assert arguments == mount.Arguments(
        "/dev/sdb", "/mnt", "rw,noatime,port=7", sloppy=True, verbose=True, fake=False, namespace=None
    )
    assert parse_arguments(["a", "b", "-r", "-t", "mxfs", "-N", "/proc/1/ns/mnt"]).options == "ro"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "usage:"),
        (["/dev/sdb"], "usage:"),
        (["a", "b", "c"], "usage:"),
        (["a", "b", "-x"], "option -x not recognized"),
        (["a", "b", "-o"], "option -o requires argument"),
        (["a", "b", "-t", "xfs"], "type xfs is not mxfs"),
    ],
)
def test_bad_command_lines(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mount.main(words) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.startswith("mount.mxfs: ")
    assert said.count("\n") == 1


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount.main(["/dev/null", "/", "-o", "rw,colour=red"]) == 1
    assert "mount.mxfs: /dev/null: unknown option colour=red; known are" in capsys.readouterr().err


def test_mount_points_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        mount.check_directory(str(tmp_path / "file"))
    with pytest.raises(MountError, match="No such file"):
        mount.check_directory(str(tmp_path / "absent"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert mount.check_directory(str(tmp_path / "link")) == os.path.realpath(tmp_path)


def test_devices_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(MountError, match="regular file: attach it with losetup"):
        mount.check_device(str(tmp_path / "image"))
    with pytest.raises(MountError, match="not a block device"):
        mount.check_device("/dev/null")
    with pytest.raises(MountError, match="No such file"):
        mount.check_device(str(tmp_path / "absent"))


def test_a_tag_that_nothing_has() -> None:
    assert mount.resolve("/dev/sd=b") == "/dev/sd=b"
    with pytest.raises(MountError, match="no device with UUID 00000000"):
        mount.resolve("UUID=00000000-dead-beef-0000-000000000000")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    """A loop device of 8 MiB of zeros."""
    path = tmp_path / "image"
    path.write_bytes(b"\\0")
    os.truncate(path, 8 << 20)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield loop
    subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.mark.needs("root", "loop")
def test_a_blank_device_and_a_foreign_one_are_named(image: str, tmp_path: Path) -> None:
    with pytest.raises(MountError, match=f"holds no file system: make a volume with mkfs.mxfs {image}"):
        mount.volume_uuid(image)
    subprocess.run(["mkswap", image], check=True, capture_output=True)
    with pytest.raises(MountError, match="holds swap, no MXFS volume"):
        mount.volume_uuid(image)


@pytest.mark.needs("root", "loop")
def test_a_plain_xfs_may_be_a_volume_that_this_host_does_not_see(tmp_path: Path) -> None:
    """It is not told to mount it as XFS."""
    path = tmp_path / "xfs.img"
    with open(path, "wb") as file:
        file.truncate(320 << 20)
    subprocess.run(["mkfs.xfs", "-q", path], check=True)
    with loop_device(path) as device:
        with pytest.raises(
            MountError, match="holds plain XFS, no MXFS volume, as this host sees it: .* rescan"
        ) as caught:
            mount.volume_uuid(device)
    assert "mount -t xfs" not in str(caught.value) and f"mxfs adopt {device} makes it one" in str(caught.value)


@pytest.mark.needs("root", "loop")
def test_a_read_only_device_is_refused(image: str) -> None:
    # On a loop device the mark outlives the device's file, so it is always taken back.
    subprocess.run(["blockdev", "--setro", image], check=True)
    try:
        with pytest.raises(MountError, match="is read-only"):
            mount.check_device(image)
    finally:
        subprocess.run(["blockdev", "--setrw", image], check=True)


@pytest.mark.needs("root", "loop")
def test_a_claimed_device_is_refused(image: str) -> None:
    mount.check_unused(image)
    fd = os.open(image, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(MountError, match="is in use on this host"):
            mount.check_unused(image)
    finally:
        os.close(fd)


@pytest.mark.needs("root", "loop")
def test_a_locked_device_is_waited_for_and_then_refused(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "LOCK_S", 0.0)
    with mount._DeviceLock(image):
        with pytest.raises(MountError, match="holds the device locked"):
            with mount._DeviceLock(image):
                pass
    with mount._DeviceLock(image):
        pass


class _Volume:
    """A mount.mxfs whose device checks pass and whose daemon is a script."""

    def __init__(self, tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image, self.root, self.dir = image, tmp_path / "run", tmp_path / "mnt"
        self.dir.mkdir()
        self.options = MountOptions(state=str(self.root))
        self.run_dir = self.root / "the-uuid"
        self._patch = monkeypatch
        monkeypatch.setattr(mount, "volume_uuid", lambda *_words: "the-uuid")

    def mount(self, script: str) -> mount.Mounted:
        argv = [sys.executable, "-c", STUB + script]
        self._patch.setattr(mount, "daemon_command", lambda *words: argv)
        return mount.mount_volume(self.image, str(self.dir), self.options, direct=True)

    def left(self) -> list[int]:
        return [pid for pid in procs._pids() if procs.has_variable(pid, spawn.TOKEN_ENV) and self._ours(pid)]

    def _ours(self, pid: int) -> bool:
        try:
            return str(self.image) in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return False


@pytest.fixture
def volume(tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> _Volume:
    monkeypatch.setenv("MXFS_TEST_DEVICE", image)
    return _Volume(tmp_path, image, monkeypatch)


@pytest.mark.needs("root", "loop")
def test_a_ready_daemon_is_left_running_as_nobodys_child(volume: _Volume) -> None:
    mounted = volume.mount("say('ready\\n'); time.sleep(60)")
    assert mounted.daemon is not None
    try:
        assert mounted.daemon.processes() == [mounted.daemon.pid]
        status = Path(f"/proc/{mounted.daemon.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" not in status
        assert os.getsid(mounted.daemon.pid) != os.getsid(0)
        assert os.readlink(f"/proc/{mounted.daemon.pid}/fd/2") == str(volume.run_dir / "daemon.log")
        assert stat.S_IMODE(volume.run_dir.stat().st_mode) == 0o700
        # Nothing of this process may leak into the daemon: its pipe, and the interpreter's own, are all it has.
        assert {os.readlink(f"/proc/{mounted.daemon.pid}/fd/{fd}") for fd in (0, 1)} == {"/dev/null"}
        assert not procs.holds(mounted.daemon.pid, volume.image)
    finally:
        mounted.daemon.end()
    assert volume.left() == []


FAILURES = [
    ("say('error: the disk is on fire\\n'); time.sleep(60)", "the disk is on fire"),
    ("say('error:\\n')", "the daemon failed"),
    ("sys.exit(3)", "the daemon ended before it was ready"),
    ("print('Boom: it broke', file=sys.stderr); sys.exit(3)", r"its last words: Boom: it broke"),
    ("say('rea'); sys.exit(0)", "the daemon ended before it was ready"),
]


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize(("script", "reason"), FAILURES)
def test_a_failed_mount_leaves_nothing(volume: _Volume, script: str, reason: str) -> None:
    with pytest.raises(MountError, match=reason) as caught:
        volume.mount(script)
    assert caught.value.code == 32
    assert "\n" not in str(caught.value)
    assert not volume.run_dir.exists()
    assert volume.left() == []


@pytest.mark.needs("root", "loop")
def test_a_silent_daemon_is_ended_with_its_helpers(volume: _Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "ready_s", lambda _options: 0.5)
    monkeypatch.setattr(spawn, "TERM_S", 0.2)
    # A helper in a session of its own, and a daemon deaf to SIGTERM.
    script = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    )
    with pytest.raises(MountError, match=r"not ready within 0\.5 s"):
        volume.mount(script)
    assert volume.left() == []
    assert not volume.run_dir.exists()


@pytest.mark.needs("root", "loop")
def test_a_failure_keeps_the_nodes_identity(volume: _Volume) -> None:
    volume.run_dir.mkdir(parents=True)
    (volume.run_dir / "node-x.json").write_text("{}")
    with pytest.raises(MountError):
        volume.mount("sys.exit(1)")
    assert [path.name for path in volume.run_dir.iterdir()] == ["node-x.json"]


@pytest.mark.needs("root", "loop")
def test_an_interrupt_ends_the_daemon(volume: _Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spawn, "wait_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        volume.mount("time.sleep(60)")
    assert volume.left() == []
    assert not volume.run_dir.exists()


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    daemon, fd = spawn.launch([str(tmp_path / "absent")], str(tmp_path / "log"))
    try:
        with pytest.raises(spawn.DaemonFailed, match="cannot start"):
            spawn.wait_ready(fd, 10, str(tmp_path / "log"))
    finally:
        os.close(fd)
    assert daemon.wait_gone(5)


@pytest.mark.needs("netns")
def test_a_network_namespace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spawn.launch(["/bin/true"], str(tmp_path / "log"), netns=str(tmp_path / "absent"))


def test_the_daemons_options_parse_again() -> None:
    options = parse("ro,peer=10.0.0.1,node=a,noexec,state=/run/x")
    argv = mount.daemon_command("/dev/sdb", "/mnt", options)
    assert parse(argv[argv.index("--options") + 1]) == options


def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys, mxfsd.cli.mount, mxfsd.io.lockspace\n"
        "heavy = {'cryptography', 'pyroute2', 'pyfuse3', 'structlog', 'asyncio', 'trio'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_unit_runs_the_daemon_with_the_values_of_its_environment_file(tmp_path: Path) -> None:
    """The unit's command line, run by hand as systemd.service(5) says that systemd runs it."""
    unit = Path(__file__).parents[2] / "systemd" / systemd.UNIT
    line = next(text for text in unit.read_text().splitlines() if text.startswith("ExecStart="))
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT"\n')
    fake.chmod(0o755)
    mountpoint = "/mnt/a 'b' \"c\" $d"
    values = {
        "MXFS_PYTHON": str(fake),
        "MXFS_DEVICE": "/dev/sdb",
        "MXFS_MOUNTPOINT": mountpoint,
        "MXFS_OPTIONS": "",
    }
    # ${NAME} as a word of its own is one argument, whatever is in it; the first word is taken as it is.
    first, *words = line.removeprefix("ExecStart=").split()
    words = [values[word[2:-1]] if word.startswith("${") else word for word in words]
    assert not any("$" in word for word in words if word != mountpoint)
    subprocess.run([first, *words], env={**values, "OUT": str(tmp_path / "out")}, check=True)
    told = (tmp_path / "out").read_text().splitlines()
    assert told[:3] == ["-P", "-m", "mxfsd.cli.mxfsd"] and "--supervised" in told
    assert told[told.index("--mountpoint") + 1] == mountpoint
    assert told[told.index("--options") + 1] == ""


class _Systemctl:
    """A systemctl(1) that does what a test says; ``calls`` is what it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        monkeypatch.setattr(systemd, "RUNTIME_FOLDER", str(folder / "units"))

    def does(self, start: str, status: str = "") -> None:
        """*start*: what its ``start`` does, in shell; *status*: the daemon's last STATUS=."""
        script = self.folder / "bin" / "systemctl"
        script.write_text(
            f'#!/bin/sh\necho "$@" >>{self.folder}/calls\ncase $1 in\nstart) {start} ;;\n'
            f"show) echo '{status}' ;;\nesac\n"
        )
        script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def start(self, ready_s: float = 30.0) -> None:
        systemd.start_unit("mxfsd@x.service", "/dev/sdb", "/mnt", parse(""), str(self.folder), ready_s)


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Systemctl:
    return _Systemctl(tmp_path, monkeypatch)


def test_a_unit_that_starts(systemctl: _Systemctl) -> None:
    systemctl.does("true")
    systemctl.start()
    assert systemctl.calls == ["start mxfsd@x.service"]
    assert 'MXFS_DEVICE="/dev/sdb"' in (systemctl.folder / "mount.env").read_text()
    # It is stopped after the mount.
    order = systemctl.folder / "units" / "mxfsd@x.service.d" / "mount.conf"
    assert order.read_text() == "[Unit]\nBefore=mnt.mount\n"


@pytest.mark.parametrize(
    ("mountpoint", "unit"),
    [  # systemd-escape --path --suffix=mount
        ("/mnt/shared", "mnt-shared.mount"),
        ("/mnt/a b-c", r"mnt-a\x20b\x2dc.mount"),
        ("/.x/.y", r"\x2ex-.y.mount"),
        ("/srv//a:b_c.d@e/", r"srv-a:b_c.d\x40e.mount"),
        ("/\u00e9%\\'\"", r"\xc3\xa9\x25\x5c\x27\x22.mount"),
    ],
)
def test_the_mount_unit_of_a_path(mountpoint: str, unit: str) -> None:
    assert systemd.mount_unit(mountpoint) == unit


@pytest.mark.parametrize(
    ("status", "log", "reason", "code"),
    [
        ("error: no home answers", "noise\n", "no home answers", 32),
        ("home, epoch 1", "noise\nKilled\n", "the daemon ended before it was ready (its last words: Killed)", 32),
        ("", None, "systemctl start mxfsd@x.service: Unit not found.", 2),
    ],
)
def test_a_unit_that_fails_is_stopped_and_says_why(
    systemctl: _Systemctl, status: str, log: str | None, reason: str, code: int
) -> None:
    if log is not None:
        (systemctl.folder / "daemon.log").write_text(log)
    systemctl.does("echo Unit not found. >&2; exit 5", status)
    with pytest.raises(MountError) as caught:
        systemctl.start()
    assert (str(caught.value), caught.value.code) == (reason, code)
    assert systemctl.calls[-2:] == ["stop mxfsd@x.service", "reset-failed mxfsd@x.service"]


def test_a_unit_that_is_not_ready_in_time(systemctl: _Systemctl) -> None:
    systemctl.does("exec sleep 30")
    with pytest.raises(MountError, match=r"not ready within 0\.2 s"):
        systemctl.start(0.2)
    assert systemctl.calls[-2:] == ["stop mxfsd@x.service", "reset-failed mxfsd@x.service"]


def test_environment_files_are_quoted() -> None:
    text = systemd.environment_file({"A": 'x "y" $z \\ `w`'})
    assert text == 'A="x \\"y\\" \\$z \\\\ \\`w\\`"\n'


def test_signals_are_default_in_the_daemon(tmp_path: Path) -> None:
    code = (
        STUB + "import signal\nsay('ready\\n' if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 'error: x\\n')"
    )
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        daemon, fd = spawn.launch([sys.executable, "-c", code], str(tmp_path / "log"))
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        spawn.wait_ready(fd, 10, str(tmp_path / "log"))
    finally:
        os.close(fd)
    assert daemon.wait_gone(10)


@pytest.mark.parametrize(("name", "seconds"), [("fast", 30), ("default", 30), ("patient", 120)])
def test_the_daemon_is_waited_for_as_long_as_the_timeouts_say(name: str, seconds: int) -> None:
    assert mount.ready_s(parse(f"timeouts={name}")) == seconds


# -- what main() says, in one line and with mount(8)'s codes -----------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = mount.main(list(words))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("mount.mxfs: "), (out, err)
    return code, err


def test_only_root_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, err = said(capsys, "/dev/null", str(tmp_path))
    assert (code, "only root can mount it" in err) == (1, True)


def test_a_dead_mount_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(path: str, *, strict: bool = False) -> str:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", path)

    monkeypatch.setattr(os.path, "realpath", dead)
    with pytest.raises(MountError, match=f"{tmp_path}: a dead mount is there; umount -l {tmp_path} first"):
        mount.check_directory(str(tmp_path))


def test_a_mount_point_that_has_a_volume_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = mountinfo.Mount(1, 2, str(tmp_path), "fuse.mxfs", "/dev/sdz")
    monkeypatch.setattr(mountinfo, "at", lambda _path: there)
    with pytest.raises(MountError, match=f"mount point {tmp_path}: /dev/sdz is mounted there already"):
        mount.check_directory(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TornRecord("checksum"), "damaged lockspace: checksum"),
        (OtherVersion("format version 9"), "damaged lockspace: format version 9"),
        (DeviceTooSmall("rescan it here"), "^rescan it here"),
        (IoFailure("is reserved by another host, and has no paths", errno.EBADE), "^is reserved by another host"),
    ],
)
def test_why_there_is_no_volume_to_be_seen(error: MxfsError, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_device: str, _pr_device: str | None) -> bytes:
        raise error

    monkeypatch.setattr(admission, "volume_of", fails)
    with pytest.raises(MountError, match=says):
        mount.volume_uuid("/dev/sdz")


def test_without_blkid_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_words: object, **_options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "run", missing)
    assert mount.what_instead("/dev/sdz", "no lockspace") == (
        "is no MXFS volume (no lockspace); cannot run blkid to look at /dev/sdz: No such file or directory: "
        "install util-linux"
    )


@pytest.mark.needs("root", "loop")
def test_a_device_that_does_not_open(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_path: str, _flags: int) -> int:
        raise OSError(errno.ENXIO, "No such device or address")

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(MountError, match="cannot open: No such device or address"):
        mount.check_unused(image)


@pytest.mark.needs("root", "loop")
def test_a_run_directory_that_cannot_be_made(volume: _Volume) -> None:
    volume.root.write_text("a file")
    with pytest.raises(MountError, match=f"run directory {volume.run_dir}: File exists") as caught:
        volume.mount("")
    assert caught.value.code == mount.EXIT_SYSTEM


@pytest.mark.needs("root", "loop")
def test_a_daemon_that_cannot_be_started(volume: _Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_words: object, **_options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(spawn, "launch", fails)
    with pytest.raises(MountError, match="cannot start the daemon: .*Cannot allocate memory") as caught:
        volume.mount("")
    assert caught.value.code == mount.EXIT_SYSTEM


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 8, "interrupted"), (OSError(errno.EIO, "Input/output error"), 2, "Input/output error")],
)
def test_what_ends_a_mount(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_words: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(mount, "mount_volume", fails)
    got, err = said(capsys, "/dev/sdz", "/mnt")
    assert got == code and err.startswith("mount.mxfs: /dev/sdz: ") and says in err
