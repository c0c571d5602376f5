"""What ``mxfs status`` and ``mxfs locks`` show, as JSON objects."""

import time
from typing import TYPE_CHECKING, Any

from mxfs_proto.filelocks import LAST, WRITE, is_resource
from mxfs_proto.ondisk import SlotState
from mxfsd.figures import BUCKETS_S
from mxfsd.io.clock import now_ms

if TYPE_CHECKING:
    from mxfsd.daemon import Daemon

LOCKS_MAX = 20_000
"""Resources listed at most."""


def _name(daemon: "Daemon", slot: int) -> str:
    report = daemon.heartbeat.report if daemon.heartbeat is not None else None
    view = report.slots.get(slot) if report is not None else None
    return view.name if view is not None else (f"slot {slot}" if slot else "")


def in_words(daemon: "Daemon") -> str:
    """What this node is for the volume, in a line for ``systemctl status``."""
    if not daemon.serving:
        return f"recovering, epoch {daemon.epoch}: operations wait"
    if daemon.home is not None:
        return f"home, epoch {daemon.epoch}, {len(daemon.peers)} other nodes"
    return f"client of {_name(daemon, daemon.home_slot)}, epoch {daemon.epoch}"


def status_report(daemon: "Daemon") -> dict[str, Any]:
    """The state of this node and what it sees of the others."""
    report = daemon.heartbeat.report if daemon.heartbeat is not None else None
    nodes = []
    for view in sorted(report.slots.values(), key=lambda v: v.slot) if report is not None else ():
        if view.state is SlotState.FREE:
            continue
        nodes.append(
            {
                "slot": view.slot,
                "name": view.name,
                "state": view.state.name.lower(),
                "incarnation": view.incarnation,
                "age_ms": view.age_ms,
                "home": view.slot == daemon.home_slot,
                "address": f"{view.addresses[0].host}:{view.addresses[0].port}" if view.addresses else "",
            }
        )
    home = daemon.home
    state = "serving" if daemon.serving else "recovering"
    return {
        "volume": str(daemon.volume),
        "label": daemon.lockspace.label,
        "device": daemon.device,
        "mountpoint": daemon.mountpoint,
        "node": daemon.name,
        "slot": daemon.slot,
        "home": _name(daemon, daemon.home_slot),
        "home_slot": daemon.home_slot,
        "epoch": daemon.epoch,
        "state": state,
        "serving": daemon.serving,
        "role": "home" if home is not None else "client",
        "nodes": nodes,
        "locks": home.lock_counts() if home is not None else {},
        "basts": home.master.basts if home is not None else 0,
        "ops": home.operation_counts() if home is not None else {},
        "fencing": daemon.fencing.name,
        "warning": daemon.fencing.warning,
        "takeover_ms": daemon.succession.took_ms,
        "takeovers": dict(daemon.succession.takeovers),
        "totals": daemon.figures.totals(home.totals() if home is not None else {}),
        "lease": _lease(daemon),
        "incarnation": daemon.held.record.incarnation if daemon.held is not None else 0,
        "discovery": daemon.finder.report() if daemon.finder is not None else {},
        "pid": {"fuse": daemon.fuse.pid if daemon.fuse is not None else 0},
    }


def _lease(daemon: "Daemon") -> dict[str, Any]:
    """For how long the home's lease has not been renewed, as far as this node sees, and how long what it caches (on the
    home: what it does) is good for."""
    heartbeat = daemon.heartbeat
    report = heartbeat.report if heartbeat is not None else None
    if heartbeat is None or report is None:
        return {"age_ms": None, "left_ms": 0}
    until = daemon.client_lease_until_ms if daemon.home is None else daemon._home_lease_until_ms()
    age = report.lease.age_ms + now_ms() - heartbeat.last_report_ms if report.lease is not None else None
    return {"age_ms": age, "left_ms": max(0, until - now_ms())}


def figures_report(daemon: "Daemon") -> dict[str, Any]:
    """What ``mxfs top`` and metrics show beyond the status: what was done for each node, by operation.

    *now_s* is the daemon's clock, for rates. Who holds and waits for what is known at the home alone.
    """
    home = daemon.home
    nodes = daemon.figures.nodes()
    here: dict[str, Any] = {}
    if home is not None:
        held, waiting, unstable = home.master.held, home.master.waiting(), home.service.unstable_files()
        for node in nodes:
            slot = node["slot"]
            node["held"] = held.get(slot, 0)
            node["waiting"] = waiting.get(slot, 0)
            node["unstable_files"] = unstable.get(slot, 0)
        here = {"running": home.running, "connected": len(daemon.peers)}
    return {"now_s": time.monotonic(), "buckets_s": list(BUCKETS_S), "nodes": nodes, "here": here}


def full_report(daemon: "Daemon") -> dict[str, Any]:
    """The state, and what was counted, which is longer."""
    return {**status_report(daemon), "figures": figures_report(daemon)}


def locks_report(daemon: "Daemon") -> dict[str, Any]:
    """Each resource that some node but the home's own FUSE layer has asked for. Only the home knows."""
    if daemon.home is None:
        return {"home": _name(daemon, daemon.home_slot), "resources": [], "here": False}
    resources: list[dict[str, Any]] = []
    for view in daemon.home.master.snapshot(now_ms()):
        if is_resource(view.ino):
            continue  # shown as file locks
        if len(resources) >= LOCKS_MAX:
            break
        resources.append(
            {
                "ino": view.ino,
                "holders": [
                    {
                        "node": _name(daemon, h.node),
                        "mode": h.mode.name,
                        "seq": h.seq,
                        "age_ms": h.age_ms,
                        "op": h.op_id,
                    }
                    for h in view.holders
                ],
                "waiters": [
                    {"node": _name(daemon, w.node), "mode": w.mode.name, "age_ms": w.age_ms, "op": w.op_id}
                    for w in view.waiters
                ],
                "opens": {_name(daemon, node): list(counts) for node, counts in view.opens},
            }
        )
    return {"home": daemon.name, "resources": resources, "file_locks": _file_locks(daemon), "here": True}


def _file_locks(daemon: "Daemon") -> list[dict[str, Any]]:
    """flocks and byte-range locks that the home knows. *alone*: the node decides alone, and may have others."""
    assert daemon.home is not None
    return [
        {
            "ino": row.ino,
            "kind": "flock" if row.held.flock else "posix",
            "type": "write" if row.held.type == WRITE else "read",
            "start": row.held.start,
            "end": None if row.held.end == LAST else row.held.end,
            "node": _name(daemon, row.node),
            "pid": row.held.pid,
            "waiting": row.waiting,
            "alone": alone,
        }
        for row, alone in daemon.home.service.file_locks.view()[:LOCKS_MAX]
    ]
