"""The replies of ``mxfs status`` and ``mxfs locks`` as text."""

from typing import Any

from mxfsd.cli.table import table


def age(milliseconds: int | None) -> str:
    """Return a duration in a unit that suits it: ``340 ms``, ``12.3 s``, ``5 min``, ``3 h``."""
    if milliseconds is None:
        return "?"
    if milliseconds < 1000:
        return f"{milliseconds} ms"
    if milliseconds < 100_000:
        return f"{milliseconds / 1000:.1f} s"
    if milliseconds < 100 * 60_000:
        return f"{milliseconds // 60_000} min"
    return f"{milliseconds // 3_600_000} h"


def size(count: int) -> str:
    """Return a number of bytes in a binary unit: ``17 B``, ``3.4 KiB``, ``2.0 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def status_text(view: dict[str, Any]) -> str:
    """Return one volume's status: its lines of facts, then a table of the nodes."""
    label = f" ({view['label']})" if view.get("label") else ""
    lines = [
        f"volume {view['volume']}{label}: {view['device']} at {view['mountpoint']}",
        f"  this node {view['node']} (slot {view['slot']}), home {view['home'] or 'none'}, "
        f"epoch {view['epoch']}, {view['state']}, fencing by {view.get('fencing', '?')}",
    ]
    locks, ops = view.get("locks") or {}, view.get("ops") or {}
    if locks:
        lines.append(
            f"  locks: {locks.get('held', 0)} held, {locks.get('cached', 0)} cached, "
            f"{locks.get('waiting', 0)} waiting; {view.get('basts', 0)} BASTs"
        )
    if ops:
        lines.append(
            f"  operations: {ops.get('shipped', 0)} shipped, {ops.get('executed', 0)} executed; "
            f"{size(ops.get('bytes_read', 0))} read, {size(ops.get('bytes_written', 0))} written"
        )
    if not locks and not ops:
        lines.append(f"  locks and operations are counted at the home: mxfs status on {view['home'] or 'the home'}")
    totals, takeovers = view.get("totals"), view.get("takeovers")
    if totals and takeovers:
        count = sum(takeovers.values())
        last = f", the last in {age(view.get('takeover_ms'))}" if count else ""
        lines.append(
            f"  since this daemon started: home {count} times{last}; nodes put out {totals['put_out']}; "
            f"{totals['grants']} grants, {totals['waits']} waits, {totals['log_forces']} log forces"
        )
    rows = [
        [
            node["slot"],
            node["name"],
            node["state"],
            "home" if node.get("home") else "",
            node.get("incarnation", ""),
            age(node.get("age_ms")),
            node.get("address") or "",
        ]
        for node in view["nodes"]
    ]
    lines.append(table(["slot", "node", "state", "role", "incarnation", "last beat", "address"], rows))
    return "\n".join(lines)


def locks_text(reply: dict[str, Any]) -> str:
    """Return one volume's locks: a table with a line for each resource; waiters in the order of their queue."""
    head = f"volume {reply['volume']} at {reply['mountpoint']}, home {reply.get('home') or 'none'}"
    if not reply.get("here", True):
        return f"{head}: the home knows the locks; run mxfs locks there"
    rows = [
        [
            resource["ino"],
            ", ".join(map(_entry, resource.get("holders", []))) or "-",
            ", ".join(map(_entry, resource.get("waiters", []))) or "-",
            ", ".join(f"{node} {r}r {w}w" for node, (r, w) in sorted(resource.get("opens", {}).items())),
        ]
        for resource in reply.get("resources", [])
    ]
    file_locks = [
        [
            lock["ino"],
            f"{lock['type']} {lock['kind']}",
            "all" if lock["kind"] == "flock" else f"{lock['start']}-{'' if lock['end'] is None else lock['end']}",
            f"{lock['node']} pid {lock['pid']}",
            "waits" if lock["waiting"] else "held, the node decides alone" if lock["alone"] else "held",
        ]
        for lock in reply.get("file_locks", [])
    ]
    text = f"{head}\n" + table(["inode", "holders", "waiters", "open (readers, writers)"], rows) if rows else ""
    if file_locks:
        text = f"{text or head}\n" + table(["inode", "file lock", "bytes", "of", "state"], file_locks)
    return text or f"{head}: no lock but the home's own"


def _entry(entry: dict[str, Any]) -> str:
    """``n2 PR 3.1 s``; ``(op)`` marks the lock of one operation, as against a cached one."""
    operation = " (op)" if entry.get("op") else ""
    return f"{entry['node']} {entry['mode']}{operation} {age(entry.get('age_ms'))}"
