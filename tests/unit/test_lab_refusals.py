"""mxfs lab: what its commands refuse, with a lab that exists as a record only."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mxfs_proto.errors import IoFailure
from mxfsd import control, procs, rundir
from mxfsd.cli import mxfs
from mxfsd.lab import lab as lab_module
from mxfsd.lab import net, target
from mxfsd.lab.lab import Lab
from mxfsd.lab.state import DEAD, STOPPED, UP, Node, Paths, State, save

pytestmark = pytest.mark.needs("root")
Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A lab of n1, which is up, n2, which was stopped, and n3, which is dead; nothing of it runs."""
    paths = Paths(tmp_path)
    paths.private.mkdir()
    nodes = [Node(1, UP), Node(2, STOPPED), Node(3, DEAD)]
    save(paths, State("0" * 8, "fast", volume="vol", nodes=nodes))
    for node in nodes:
        (paths.run_root(node.name) / "vol").mkdir(parents=True)
    return tmp_path


def refusal(capsys: Capsys, *words: str | Path) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert mxfs.main(["lab", *map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mxfs lab: ") and err.count("\n") == 1, (out, err)
    return err


@pytest.mark.parametrize("command", ["stop", "kill", "crash", "move-home", "start", "partition", "heal"])
def test_a_node_that_there_is_not(folder: Path, command: str, capsys: Capsys) -> None:
    more = ["--process", "fuse"] if command == "crash" else []
    assert "n9: no such node; the lab has n1, n2, n3" in refusal(capsys, command, folder, "n9", *more)


@pytest.mark.parametrize("command", ["stop", "kill", "crash", "move-home"])
@pytest.mark.parametrize(("node", "state"), [("n2", "stopped"), ("3", "dead")])
def test_a_node_that_is_not_up(folder: Path, command: str, node: str, state: str, capsys: Capsys) -> None:
    more = ["--process", "fuse"] if command == "crash" else []
    assert f"is not up but {state}" in refusal(capsys, command, folder, node, *more)


def test_exec_on_a_node_that_there_is_not(folder: Path, capsys: Capsys) -> None:
    assert "n9: no such node" in refusal(capsys, "exec", folder, "n9", "--", "true")


@pytest.mark.parametrize("process", ["daemon", "fuse", "heartbeat"])
def test_a_process_that_is_gone_already(folder: Path, process: str, capsys: Capsys) -> None:
    assert f"n1 has no {process} process just now" in refusal(capsys, "crash", folder, "n1", "--process", process)


def test_a_process_that_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    rundir.remember(str(folder / ".lab/n1/run/vol"), rundir.FUSE, os.getpid())
    monkeypatch.setattr(procs, "send", lambda *_words: None)
    monkeypatch.setattr(procs, "wait_until", lambda *_words: False)
    said = refusal(capsys, "crash", folder, "n1", "--process", "fuse")
    assert f"process {os.getpid()} (fuse of n1) does not end" in said


def test_a_home_that_does_not_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    def request(_path: Path, _cmd: str, _timeout_s: float, **_fields: Any) -> dict[str, Any]:
        return {"home": "n2", "state": "serving"}

    monkeypatch.setattr(control, "request", request)
    monkeypatch.setattr(lab_module, "MOVE_S", 0.05)
    assert "the home did not arrive at n1 within 0.05 s" in refusal(capsys, "move-home", folder, "n1")
    monkeypatch.undo()
    assert "no daemon is running" in refusal(capsys, "move-home", folder, "n1")


def test_a_daemon_that_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    """After its unmount."""
    monkeypatch.setattr(lab_module.spawn.Daemon, "wait_gone", lambda *_words: False)
    assert "n1 is unmounted, but its daemon did not end within" in refusal(capsys, "stop", folder, "n1")


def test_what_umount_says_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setattr(lab_module.mountinfo, "at", lambda _path: object())
    monkeypatch.setattr(lab_module, "_umount", lambda _path: "umount: not permitted")
    assert "n1: umount: not permitted" in refusal(capsys, "stop", folder, "n1")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _text: "{", "lab.json is damaged; remove the lab with mxfs lab down"),
        (lambda text: json.dumps(json.loads(text) | {"version": 9}), "lab.json is of another version of mxfs lab"),
    ],
)
def test_a_record_that_cannot_be_used(folder: Path, damage: Callable[[str], str], says: str, capsys: Capsys) -> None:
    record = folder / ".lab/lab.json"
    record.write_text(damage(record.read_text()))
    assert says in refusal(capsys, "status", folder)


def test_only_root_has_labs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "a lab needs root" in refusal(capsys, "status", folder)


@pytest.mark.parametrize(
    ("error", "says"),
    [(KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device"), "[Errno 28] No space left")],
)
def test_what_ends_a_command(
    folder: Path, error: BaseException, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    def fails(_lab: Lab) -> None:
        raise error

    monkeypatch.setattr(Lab, "status", fails)
    assert says in refusal(capsys, "status", folder)


def test_programs_that_fail_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ip and tgtadm, with what they said; a link that does not change."""

    def fails(argv: list[str], **_options: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(argv, 1, "", "no such thing\nmore")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(IoFailure, match=r"^ip -n x link: no such thing$"):
        net._ip("-n", "x", "link")
    made = target.Target.__new__(target.Target)
    made._environment = {}
    with pytest.raises(IoFailure, match="tgtadm --op show: no such thing"):
        made._adm("--op", "show")
    monkeypatch.setattr(net, "_ip", lambda *_words: "state DOWN")
    monkeypatch.setattr(net, "LINK_S", 0.01)
    with pytest.raises(IoFailure, match=r"the link of n2 did not go up within 0.01 s"):
        net.set_link("00000000", 2, True)
