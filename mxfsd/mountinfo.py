"""The mount table of this process, /proc/self/mountinfo, as records (proc(5)). Imports next to nothing."""

import os
from dataclasses import dataclass

PATH = "/proc/self/mountinfo"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. *device* is st_dev of the file system (anonymous for FUSE), *source* what was mounted."""

    mount_id: int
    device: int
    mountpoint: str
    fstype: str
    source: str


def read(path: str = PATH) -> list[Mount]:
    """Return the mounts in the order of the file: a later one at the same place covers an earlier one."""
    with open(path, "rb") as file:
        return [mount for mount in map(_parse, file) if mount is not None]


def at(mountpoint: str, path: str = PATH) -> Mount | None:
    """Return the topmost mount whose mount point is that absolute path, without touching the path itself."""
    found = [mount for mount in read(path) if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def is_mxfs(mount: Mount) -> bool:
    """Whether a mount is one of ours: a FUSE mount of subtype mxfs."""
    return mount.fstype in ("fuse.mxfs", "mxfs")


def _parse(line: bytes) -> Mount | None:
    # 36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw
    fields = line.rstrip(b"\n").split(b" ")
    try:
        dash = fields.index(b"-", 6)
        major, _, minor = fields[2].partition(b":")
        return Mount(
            mount_id=int(fields[0]),
            device=os.makedev(int(major), int(minor)),
            mountpoint=_unescape(fields[4]),
            fstype=_unescape(fields[dash + 1]),
            source=_unescape(fields[dash + 2]),
        )
    except (ValueError, IndexError):
        return None


def _unescape(field: bytes) -> str:
    r"""Undo the kernel's octal escapes of space, tab, newline and backslash (``\040`` and so on)."""
    if b"\\" not in field:
        return os.fsdecode(field)
    first, *rest = field.split(b"\\")
    parts = [first]
    for part in rest:
        if len(part) >= 3 and part[:3].isdigit() and part[:1] < b"4" and not set(part[:3]) & set(b"89"):
            parts.append(bytes([int(part[:3], 8)]) + part[3:])
        else:
            parts.append(b"\\" + part)
    return os.fsdecode(b"".join(parts))
