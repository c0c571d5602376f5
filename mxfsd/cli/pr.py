"""``mxfs pr DEVICE [--json]``: who is registered at the disk, and which reservation it has. Changes nothing."""

import argparse
import json
import sys
from typing import Any

from mxfs_proto.errors import MisuseError, MxfsError
from mxfs_proto.ondisk import SlotRecord
from mxfsd.cli.table import table
from mxfsd.io.lockspace import Lockspace
from mxfsd.pr.iscsi import SCHEME
from mxfsd.pr.keys import key_text, slot_of
from mxfsd.pr.probe import open_reservations
from mxfsd.pr.reservations import Reservations
from mxfsd.pr.spc import Held, PrType, Registrant

TYPE_TEXT = {
    PrType.WRITE_EXCLUSIVE: "write exclusive",
    PrType.EXCLUSIVE_ACCESS: "exclusive access",
    PrType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: "write exclusive, registrants only",
    PrType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: "exclusive access, registrants only",
    PrType.WRITE_EXCLUSIVE_ALL_REGISTRANTS: "write exclusive, all registrants",
    PrType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: "exclusive access, all registrants",
}


def collect(device: str, timeout_ms: int) -> dict[str, Any]:
    """Return what the disk says of its reservations. Raises MxfsError, MisuseError for a disk that has none."""
    probe = open_reservations(device, timeout_ms=timeout_ms)
    if probe.reservations is None:
        raise MisuseError(f"no persistent reservations: {probe.reason}")
    reservations = probe.reservations
    try:
        generation = reservations.read_keys().generation
        held = reservations.read_reservation()
        capabilities = reservations.capabilities()
        found = _registrants(reservations, held)
    finally:
        reservations.close()
    slots, why = _slots(device)
    return {
        "device": device,
        "transport": probe.transport,
        "generation": generation,
        "reservation": None
        if held is None
        else {"type": held.type, "text": type_text(held.type), "ours": held.ours, "key": _key_or_none(held.key)},
        "aptpl": None
        if capabilities is None
        else {"capable": capabilities.aptpl_capable, "active": capabilities.aptpl_active},
        "registrants": [_entry(registrant, slots) for registrant in found],
        "names_unknown": why,
    }


def type_text(number: int) -> str:
    """Return the name of a reservation type."""
    try:
        return TYPE_TEXT[PrType(number)]
    except ValueError:
        return "unknown"


def _registrants(reservations: Reservations, held: Held | None) -> tuple[Registrant, ...]:
    """Return one entry for each registered nexus; where the target has no full status, as much as the keys tell."""
    status = reservations.full_status()
    if status is not None:
        return status.registrants
    everyone = held is not None and held.type in tuple(PrType) and PrType(held.type).all_registrants
    kind = held.type if held is not None else 0
    return tuple(
        Registrant(key, everyone or (held is not None and key == held.key), kind, 0, "")
        for key in reservations.read_keys().keys
    )


def _slots(device: str) -> tuple[tuple[SlotRecord, ...], str | None]:
    """Return the slots in the lockspace, or why they are unknown: a host that is not registered may not read it."""
    if device.startswith(SCHEME):
        return (), "the lockspace is not read over iscsi addresses"
    try:
        lockspace = Lockspace.open(device, readonly=True)
        try:
            snap = lockspace.snapshot()
        finally:
            lockspace.close()
    except MxfsError as error:
        return (), str(error)
    return tuple(slot for slot in snap.slots if slot is not None), None


def _entry(registrant: Registrant, slots: tuple[SlotRecord, ...]) -> dict[str, Any]:
    owner = next((slot for slot in slots if slot.pr_key == registrant.key and registrant.key), None)
    return {
        "key": key_text(registrant.key),
        "slot": owner.slot if owner is not None else slot_of(registrant.key),
        "node": owner.name if owner is not None else None,
        "state": owner.state.name if owner is not None else None,
        "holder": registrant.holder,
        "initiator": registrant.initiator or None,
    }


def _key_or_none(key: int) -> str | None:
    return key_text(key) if key else None


def render(data: dict[str, Any]) -> str:
    """Return the text form of ``collect``."""
    held, aptpl = data["reservation"], data["aptpl"]
    kept = "unknown"
    if aptpl is not None:
        kept = "active" if aptpl["active"] else "possible, not active" if aptpl["capable"] else "not possible"
    what = "none"
    if held is not None:
        what = f"type {held['type']}, {held['text']}{'' if held['ours'] else ' (not of MXFS)'}"
    lines = [
        f"device       {data['device']} ({data['transport']})",
        f"reservation  {what}",
        f"generation   {data['generation']}",
        f"aptpl        {kept}",
    ]
    if data["names_unknown"]:
        lines.append(f"names        unknown: {data['names_unknown']}")
    rows = [
        [
            entry["key"],
            entry["slot"] or "-",
            entry["node"] or ("-" if entry["slot"] is None or data["names_unknown"] else "(an earlier incarnation)"),
            entry["state"] or "-",
            "holds" if entry["holder"] else "",
            entry["initiator"] or "",
        ]
        for entry in data["registrants"]
    ]
    if rows:
        lines.append(table(["key", "slot", "node", "state", "role", "initiator"], rows, indent=""))
    else:
        lines.append("nobody is registered")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mxfs pr``."""
    made = argparse.ArgumentParser(prog="mxfs pr", description="Show the persistent reservations of a shared disk.")
    made.add_argument("device", help="block device, or iscsi://HOST[:PORT]/TARGET/LUN")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--timeout", type=_seconds, default=10.0, metavar="S", help="seconds for each command (10)")
    return made


def main_pr(args: list[str]) -> int:
    """Run ``mxfs pr``; return the exit code (1 and one line on stderr for an error)."""
    options = parser().parse_args(args)
    try:
        data = collect(options.device, round(options.timeout * 1000))
    except MxfsError as error:
        print(f"mxfs pr: {error}", file=sys.stderr)
        return 1
    print(json.dumps(data, indent=2) if options.json else render(data))
    return 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0.1 and 600")
    return value
