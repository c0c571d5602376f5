"""``mxfs info DEVICE [--json]``: what the lockspace of a volume says. Reads only."""

import argparse
import json
import sys
import time
from typing import Any

from mxfs_proto.errors import MxfsError
from mxfs_proto.ondisk import LeaseState, SlotRecord, SlotState, format_uuid
from mxfsd.core.watch import Watch
from mxfsd.io.lockspace import Lockspace

LIVE = frozenset({SlotState.CLAIMING, SlotState.JOINING, SlotState.ACTIVE})
"""States in which a counter should move."""
MAX_WATCH_MS = 10_000
_POLL_MS = 50


def watch_slots(lockspace: Lockspace, watch: Watch, *, all_live: bool = False) -> None:
    """Read until each live slot was seen to move or had two periods of its own to do so (at most 10 s).

    *all_live* False: stop at the first one that moves, which is enough to know that the volume is in use.
    """
    snap = lockspace.snapshot()
    watch.observe(snap)
    began = snap.ended_ms
    while True:
        still = [s for s in snap.slots if s is not None and s.state in LIVE and not watch.beats(s.slot)]
        moving = any(watch.beats(s.slot) for s in snap.slots if s is not None)
        if not still or (moving and not all_live):
            return
        if snap.ended_ms - began > max(min(_patience_ms(slot), MAX_WATCH_MS) for slot in still):
            return
        lockspace.sleep(_POLL_MS / 1000)
        snap = lockspace.snapshot()
        watch.observe(snap)


def _patience_ms(slot: SlotRecord) -> int:
    return 2 * slot.heartbeat_ms + 500


def info(device: str) -> dict[str, Any]:
    """Return what is known of the volume on *device*. Raises MediaError, IoFailure.

    ``counter_age_ms`` of a slot is how long its counter stood still while we looked, for up to two heartbeat periods.
    """
    lockspace = Lockspace.open(device, readonly=True)
    try:
        watch = Watch(MAX_WATCH_MS)
        watch_slots(lockspace, watch, all_live=True)
        snap = lockspace.snapshot()
        watch.observe(snap)
        bad = {str(number): str(error) for number, error in lockspace.bad.items()}
    finally:
        lockspace.close()
    header, lease = lockspace.header, snap.lease
    slots = [
        {
            "slot": slot.slot,
            "node": slot.name,
            "uuid": format_uuid(slot.node_uuid),
            "incarnation": slot.incarnation,
            "state": slot.state.name,
            "counter": slot.counter,
            "counter_age_ms": watch.age_ms(slot.slot),
            "moves": watch.beats(slot.slot) > 0,
            "is_home": slot.is_home,
            "addresses": [f"{a.host}:{a.port}" for a in slot.addresses],
        }
        for slot in snap.slots
        if slot is not None and slot.state is not SlotState.FREE
    ]
    owner = snap.slot(lease.owner_slot) if lease is not None and lease.owner_slot else None
    return {
        "device": device,
        "uuid": format_uuid(header.volume),
        "volume_id": f"{lockspace.volume_id:016x}",
        "label": lockspace.label,
        "xfs_bytes": header.xfs_bytes,
        "lockspace_offset": header.lockspace_offset,
        "lockspace_bytes": header.lockspace_bytes,
        "created_s": header.created_s,
        "epoch": None if lease is None else lease.epoch,
        "lease": None if lease is None else lease.state.name,
        "home": None
        if lease is None or lease.state is not LeaseState.HELD
        else {"slot": lease.owner_slot, "node": owner.name if owner is not None else ""},
        "slots": slots,
        "unreadable": bad,
    }


def render(data: dict[str, Any]) -> str:
    """Return the text form of ``info``."""
    home = data["home"]
    who = f"slot {home['slot']} ({home['node']})" if home else "none"
    created = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(data["created_s"]))
    lines = [
        f"uuid       {data['uuid']}",
        f"label      {data['label'] or '-'}",
        f"xfs        {data['xfs_bytes']} bytes",
        f"lockspace  {data['lockspace_bytes']} bytes at {data['lockspace_offset']}",
        f"created    {created}",
        f"home       {who}",
        f"epoch      {data['epoch']} ({data['lease'] or 'unreadable'})",
    ]
    if data["slots"]:
        lines.append("slot  node              state     incarnation  counter     age      addresses")
    for slot in data["slots"]:
        # A counter that moves has no age to speak of, and one that need not move any more has none either.
        age = "moves" if slot["moves"] else f"{slot['counter_age_ms'] / 1000:.1f} s+"
        lines.append(
            f"{slot['slot']:<5} {slot['node']:<17} {slot['state']:<9} {slot['incarnation']:<12} "
            f"{slot['counter']:<11} {age:<8} {' '.join(slot['addresses'])}".rstrip()
        )
    if not data["slots"]:
        lines.append("no node has ever joined, or all slots were freed")
    lines += [f"unreadable {number}: {reason}" for number, reason in data["unreadable"].items()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``mxfs info``."""
    made = argparse.ArgumentParser(prog="mxfs info", description="Show the lockspace of a volume.")
    made.add_argument("device", help="block device with an MXFS volume")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main_info(args: list[str]) -> int:
    """Run ``mxfs info``; return the exit code (1 and one line on stderr for an error)."""
    options = parser().parse_args(args)
    try:
        data = info(options.device)
    except MxfsError as error:
        from mxfsd.cli.device import explain

        print(f"mxfs info: {explain(options.device, error)}", file=sys.stderr)
        return 1
    print(json.dumps(data, indent=2) if options.json else render(data))
    return 0
