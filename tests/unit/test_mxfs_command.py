"""``mxfs``: against daemons that only have a control socket; and its installation below another root."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure, MisuseError
from mxfsd.cli import install, mxfs
from mxfsd.cli.render import age, locks_text, size, status_text
from mxfsd.cli.table import table
from mxfsd.control import ControlServer

UUID = "5bbb064e-197b-4499-8c84-1a3eed3b6914"
STATUS: dict[str, Any] = {
    "volume": UUID,
    "label": "data",
    "device": "/dev/sdb",
    "mountpoint": "/mnt/shared",
    "node": "alpha",
    "slot": 1,
    "home": "alpha",
    "home_slot": 1,
    "epoch": 7,
    "state": "serving",
    "nodes": [
        {
            "slot": 1,
            "name": "alpha",
            "state": "active",
            "incarnation": 3,
            "age_ms": 120,
            "home": True,
            "address": "a:1",
        },
        {"slot": 2, "name": "beta", "state": "failed", "incarnation": 1, "age_ms": 15300, "home": False, "address": ""},
    ],
    "locks": {"held": 5, "cached": 4, "waiting": 1},
    "basts": 9,
    "ops": {"shipped": 3, "executed": 2, "bytes_read": 2048, "bytes_written": 17},
    "fencing": "lease",
}
LOCKS: dict[str, Any] = {
    "home": "alpha",
    "here": True,
    "resources": [
        {
            "ino": 131,
            "holders": [
                {"node": "alpha", "mode": "PR", "seq": 4, "age_ms": 900, "op": None},
                {"node": "beta", "mode": "EX", "seq": 5, "age_ms": 2, "op": 77},
            ],
            "waiters": [{"node": "beta", "mode": "PW", "age_ms": 31000, "op": None}],
            "opens": {"beta": [1, 2]},
        }
    ],
}


@contextlib.contextmanager
def daemon(path: Path, status: dict[str, Any], locks: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """A control server in a thread; gives the list of the move requests that it got."""
    moves: list[dict[str, Any]] = []

    async def tell_status(_fields: dict[str, Any]) -> dict[str, Any]:
        return status

    async def tell_locks(_fields: dict[str, Any]) -> dict[str, Any]:
        return locks

    async def move(fields: dict[str, Any]) -> dict[str, Any]:
        moves.append(fields)
        return {"home": fields["node"], "epoch": 8}

    async def evict(fields: dict[str, Any]) -> dict[str, Any]:
        moves.append(fields)
        if fields["node"] == "alpha":
            raise MisuseError("alpha is the node you are on: unmount the volume instead")
        return {"node": fields["node"], "slot": 2, "incarnation": 1}

    async def sync(fields: dict[str, Any]) -> dict[str, Any]:
        if status["epoch"] == 13:
            raise IoFailure("not everything written here is durable: Input/output error")
        return {}

    started = threading.Event()
    stop: list[Any] = []

    async def serve() -> None:
        end = asyncio.Event()
        stop.extend([asyncio.get_running_loop(), end])
        handlers = {"status": tell_status, "locks": tell_locks, "home-move": move, "evict": evict, "sync": sync}
        server = ControlServer(path, handlers)
        await server.start()
        started.set()
        await end.wait()
        await server.close()

    path.parent.mkdir(parents=True)
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield moves
    finally:
        stop[0].call_soon_threadsafe(stop[1].set)
        thread.join()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXFS_RUN_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def moves(root: Path) -> Iterator[list[dict[str, Any]]]:
    with daemon(root / UUID / "control.sock", STATUS, LOCKS) as asked:
        yield asked


def test_sync_says_when_it_is_done_and_when_it_is_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon(root / UUID / "control.sock", STATUS, LOCKS):
        assert mxfs.main(["sync", "/mnt/shared"]) == 0
        assert capsys.readouterr().out == f"{UUID}: what was written on alpha is durable\n"
        assert mxfs.main(["sync", "/mnt/other"]) == 1
        assert "no such volume is mounted here" in capsys.readouterr().err
    with daemon(root / "other" / "control.sock", {**STATUS, "epoch": 13}, LOCKS):
        assert mxfs.main(["sync"]) == 1
        assert capsys.readouterr().err.endswith("not everything written here is durable: Input/output error\n")


def test_status_as_text(moves: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["status"]) == 0
    assert capsys.readouterr().out == (
        f"volume {UUID} (data): /dev/sdb at /mnt/shared\n"
        "  this node alpha (slot 1), home alpha, epoch 7, serving, fencing by lease\n"
        "  locks: 5 held, 4 cached, 1 waiting; 9 BASTs\n"
        "  operations: 3 shipped, 2 executed; 2.0 KiB read, 17 B written\n"
        "  slot  node   state   role  incarnation  last beat  address\n"
        "     1  alpha  active  home            3  120 ms     a:1\n"
        "     2  beta   failed                  1  15.3 s\n"
    )


@pytest.mark.parametrize("wanted", [UUID, "data", "/dev/sdb", "/mnt/shared", "/mnt/../mnt/shared/"])
def test_status_as_json_of_the_volume_asked_for(moves: object, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["status", "--json", wanted]) == 0
    assert json.loads(capsys.readouterr().out) == [STATUS]


def test_a_volume_that_is_not_here(moves: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["status", "nosuch"]) == 1
    assert capsys.readouterr().err == (
        f"mxfs: nosuch: no such volume is mounted here; there are {UUID} at /mnt/shared\n"
    )


def test_locks(moves: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["locks"]) == 0
    assert capsys.readouterr().out == (
        f"volume {UUID} at /mnt/shared, home alpha\n"
        "  inode  holders                             waiters         open (readers, writers)\n"
        "    131  alpha PR 900 ms, beta EX (op) 2 ms  beta PW 31.0 s  beta 1r 2w\n"
    )
    assert mxfs.main(["locks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["resources"] == LOCKS["resources"]


def test_home_move(moves: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["home", "move", "beta"]) == 0
    assert moves == [{"cmd": "home-move", "node": "beta"}]
    assert capsys.readouterr().out == f"{UUID}: home beta, epoch 8\n"


def test_home_move_with_several_volumes_wants_one_named(
    root: Path, moves: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    second = {**STATUS, "volume": "another", "mountpoint": "/mnt/b", "label": "", "device": "/dev/sdc"}
    with daemon(root / "another" / "control.sock", second, LOCKS) as more:
        assert mxfs.main(["home", "move", "beta"]) == 1
        assert "say --volume" in capsys.readouterr().err
        assert mxfs.main(["home", "move", "beta", "--volume", "/mnt/b"]) == 0
        assert mxfs.main(["status", "--json"]) == 0
    assert (len(moves), len(more)) == (0, 1)


def test_evict(moves: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["evict", "beta", "--volume", "data"]) == 0
    assert moves == [{"cmd": "evict", "node": "beta"}]
    assert capsys.readouterr().out == f"{UUID}: beta (slot 2, incarnation 1) is put out\n"
    assert mxfs.main(["evict", "alpha"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("mxfs: ") and "alpha is the node you are on" in err


@pytest.mark.parametrize(
    "words", [["status"], ["locks"], ["sync"], ["home", "move", "beta"], ["evict", "beta"], ["top"]]
)
def test_a_daemon_that_does_not_answer(
    root: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and where there is no other one the command fails."""
    monkeypatch.setattr(mxfs, "STATUS_S", 0.05)
    (root / "hangs").mkdir()
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(root / "hangs/control.sock"))
        hanging.listen()
        assert mxfs.main(words) == 1
        named, last = capsys.readouterr().err.splitlines()
        assert str(root / "hangs") in named and last == "mxfs: no daemon of this host answered"
        if words == ["status"]:
            with daemon(root / UUID / "control.sock", STATUS, LOCKS):
                assert mxfs.main(words) == 0
            out, err = capsys.readouterr()
            assert UUID in out and str(root / "hangs") in err


@pytest.mark.parametrize("words", [["status", "nosuch"], ["locks", "nosuch"], ["top", "nosuch"]])
def test_an_unknown_volume(moves: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(words) == 1
    assert "nosuch: no such volume is mounted here" in capsys.readouterr().err


def test_an_interruption_and_a_reader_that_has_seen_enough(
    moves: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(mxfs, "_dispatch", interrupted)
    assert mxfs.main(["status"]) == 1
    assert capsys.readouterr().err == "mxfs: interrupted\n"
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "mxfsd.cli.mxfs", "status", "--json"]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_no_daemon(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["status"]) == 1
    said = capsys.readouterr().err
    assert "no volume is mounted here" in said
    assert str(root) in said
    assert mxfs.main(["status", "--run-dir", "/nonexistent"]) == 1
    assert "/nonexistent" in capsys.readouterr().err


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("mxfs ")
    with pytest.raises(SystemExit) as caught:
        mxfs.main(["dance"])
    assert caught.value.code == 2


def test_what_only_the_home_knows_says_so() -> None:
    assert "run mxfs locks there" in locks_text({"volume": "v", "mountpoint": "/m", "home": "beta", "here": False})
    assert "counted at the home: mxfs status on beta" in status_text({**STATUS, "home": "beta", "locks": {}, "ops": {}})
    assert locks_text({"volume": "v", "mountpoint": "/m", "home": "", "resources": []}).endswith("but the home's own")


def test_what_is_counted_since_the_daemon_started() -> None:
    totals = {"executed": 9, "grants": 8, "waits": 2, "log_forces": 5, "put_out": 1}
    view = {**STATUS, "totals": totals, "takeovers": {"free": 1, "fenced": 1}, "takeover_ms": 340}
    line = (
        "since this daemon started: home 2 times, the last in 340 ms; nodes put out 1; 8 grants, 2 waits, 5 log forces"
    )
    assert f"  {line}\n" in status_text(view)
    never = status_text({**view, "takeovers": {"free": 0, "fenced": 0}, "takeover_ms": 0})
    assert "since this daemon started: home 0 times; nodes put out 1; 8 grants" in never


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "?"), (0, "0 ms"), (999, "999 ms"), (1000, "1.0 s"), (100_000, "1 min"), (6_000_000, "1 h")],
)
def test_ages(value: int | None, text: str) -> None:
    assert age(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


def test_a_table_without_rows_is_its_head() -> None:
    assert table(["a", "b"], []) == "  a  b"


@pytest.mark.needs("root")
def test_install_and_uninstall_below_another_root(tmp_path: Path) -> None:
    made = install.install(tmp_path)
    assert len(made) == len(install.LINKS) + len(install.files())
    assert (tmp_path / "usr/local/share/man/man8/mxfs.8").read_text().startswith('.\\" Part of MXFS')
    helper = tmp_path / "sbin" / "mount.mxfs"
    assert helper.is_symlink()
    assert helper.resolve().name == "mount.mxfs"
    assert (tmp_path / "etc/systemd/system/mxfsd@.service").read_text() == install.unit_source().read_text()
    assert install.install(tmp_path) == made  # again, over its own
    assert len(install.uninstall(tmp_path)) == len(made)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert install.uninstall(tmp_path) == []


@pytest.mark.needs("root")
def test_install_replaces_nothing_that_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "mount.mxfs").write_text("somebody's")
    assert mxfs.main(["install", "--root", str(tmp_path)]) == 1
    assert "is no link of ours" in capsys.readouterr().err
    assert (tmp_path / "sbin" / "mount.mxfs").read_text() == "somebody's"
    install.uninstall(tmp_path)
    assert (tmp_path / "sbin" / "mount.mxfs").exists()


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_only_root_installs(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert mxfs.main([command, "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "mxfs: only root can install into the system\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("root")
def test_what_keeps_an_installation_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(install, "commands_folder", lambda: tmp_path / "nowhere")
        assert mxfs.main(["install", "--root", str(tmp_path)]) == 1
    assert f"{tmp_path}/nowhere/mount.mxfs is not there: run make install" in capsys.readouterr().err
    (tmp_path / "sbin").write_text("no folder")
    assert mxfs.main(["install", "--root", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mxfs: install: ") and str(tmp_path / "sbin") in err and err.count("\n") == 1


@pytest.mark.needs("root")
def test_an_uninstallation_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install.install(tmp_path)

    def refused(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    assert mxfs.main(["uninstall", "--root", str(tmp_path)]) == 1
    assert "mxfs: uninstall: [Errno 30] Read-only file system" in capsys.readouterr().err


@pytest.mark.needs("root")
def test_a_page_of_another_is_neither_replaced_nor_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / install.MAN_FOLDER / "mxfs.8"
    place.parent.mkdir(parents=True)
    place.write_text("somebody's page")
    assert mxfs.main(["install", "--root", str(tmp_path)]) == 1
    assert f"{place} exists and is not ours: remove it first" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [place]  # nothing else was made
    place.unlink()
    install.install(tmp_path)
    place.unlink()
    place.symlink_to("/dev/null")
    assert all(str(place) not in line for line in install.uninstall(tmp_path))
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [place]
