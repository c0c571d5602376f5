"""``mxfs pr``: on a real target, on devices without reservations, and its text."""

import json
from pathlib import Path
from typing import Any

import pytest
from prkit import TgtDisk
from tgt import Tgt

from mxfs_proto.ondisk import SlotRecord, SlotState
from mxfsd.cli import mxfs, pr
from mxfsd.pr.errors import ReservationError
from mxfsd.pr.keys import key_text, make_key
from mxfsd.pr.reservations import Reservations
from mxfsd.pr.spc import Registrant

A, B = make_key(1, 0xAAAA), make_key(64, 0xBBBB)


@pytest.mark.needs("tgt")
def test_on_a_real_target(tgt_disk: TgtDisk, tgt: Tgt, capsys: pytest.CaptureFixture[str]) -> None:
    assert mxfs.main(["pr", tgt.url]) == 0
    assert "nobody is registered" in capsys.readouterr().out
    for name, key in (("a", A), ("b", B)):
        node = Reservations(name, [tgt_disk.nexus(name)])
        node.register(key)
        node.reserve()
    assert mxfs.main(["pr", tgt.url, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["transport"] == "iscsi"
    assert data["reservation"] == {"type": 8, "text": "exclusive access, all registrants", "ours": True, "key": None}
    assert data["aptpl"] == {"capable": False, "active": False}
    assert [(one["key"], one["slot"], one["holder"]) for one in data["registrants"]] == [
        (key_text(A), 1, True),
        (key_text(B), 64, True),
    ]
    assert mxfs.main(["pr", tgt.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reservation  type 8, exclusive access, all registrants" in lines
    assert "aptpl        not possible" in lines
    assert lines[-1].split()[:2] == [key_text(B), "64"]
    # Looking changes nothing.
    assert Reservations("d", [tgt_disk.nexus("a")]).read_keys().generation == data["generation"]


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert mxfs.main(["pr", *words]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    lines = caught.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_devices_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    assert one_line(capsys, str(image)) == f"mxfs pr: no persistent reservations: {image} is a file"
    assert "No such file" in one_line(capsys, "/dev/nosuch")
    assert "no block device" in one_line(capsys, "/dev/null")
    assert "iscsi://HOST" in one_line(capsys, "iscsi://nowhere")


@pytest.mark.needs("root", "loop")
def test_a_loop_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], loop_device: str) -> None:
    assert one_line(capsys, loop_device) == f"mxfs pr: no persistent reservations: {loop_device} is a loop device"


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "1e9"])
def test_bad_timeouts(text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        mxfs.main(["pr", "/dev/null", "--timeout", text])
    assert caught.value.code == 2


def test_names_come_from_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = (SlotRecord(1, SlotState.ACTIVE, name="alpha", pr_key=A), SlotRecord(2, SlotState.FREE))
    entries = [pr._entry(Registrant(key, True, 8, 1, "iqn.x"), slots) for key in (A, make_key(1, 5), 0, 0xDEAD)]
    assert [(e["slot"], e["node"], e["state"]) for e in entries] == [
        (1, "alpha", "ACTIVE"),
        (1, None, None),
        (None, None, None),
        (None, None, None),
    ]
    data: dict[str, Any] = {
        "device": "/dev/sdb",
        "transport": "sg",
        "generation": 4,
        "reservation": {"type": 5, "text": pr.type_text(5), "ours": False, "key": None},
        "aptpl": {"capable": True, "active": False},
        "registrants": entries,
        "names_unknown": None,
    }
    lines = pr.render(data).splitlines()
    assert lines[1] == "reservation  type 5, write exclusive, registrants only (not of MXFS)"
    assert lines[3] == "aptpl        possible, not active"
    assert lines[5].split() == [key_text(A), "1", "alpha", "ACTIVE", "holds", "iqn.x"]
    assert "(an earlier incarnation)" in lines[6]
    data |= {"reservation": None, "aptpl": None, "registrants": [], "names_unknown": "unreadable"}
    assert pr.render(data).splitlines()[1:] == [
        "reservation  none",
        "generation   4",
        "aptpl        unknown",
        "names        unknown: unreadable",
        "nobody is registered",
    ]
    assert pr.type_text(2) == "unknown"


def test_an_unreadable_lockspace_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_words: object, **_options: object) -> None:
        raise ReservationError("refused")

    monkeypatch.setattr(pr.Lockspace, "open", refuse)
    assert pr._slots("/dev/sdb") == ((), "refused")
