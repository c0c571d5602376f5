"""What a native request brings to an operation: the same names as pyfuse3's types have, which no program can fill."""

from dataclasses import dataclass
from typing import NamedTuple


class Context(NamedTuple):
    """Who asks (pyfuse3.RequestContext). *pid* is a thread's."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


@dataclass(slots=True)
class Fields:
    """Which attributes SETATTR changes (pyfuse3.SetattrFields)."""

    update_mode: bool = False
    update_uid: bool = False
    update_gid: bool = False
    update_size: bool = False
    update_atime: bool = False
    update_mtime: bool = False


@dataclass(slots=True)
class Attributes:
    """The attributes that SETATTR brings (of pyfuse3.EntryAttributes what it uses)."""

    st_mode: int = 0
    st_uid: int = 0
    st_gid: int = 0
    st_size: int = 0
    st_atime_ns: int = 0
    st_mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class FileLock:
    """A flock or a byte-range lock. *start* and *end* (inclusive) are bytes, *type* is F_RDLCK, F_WRLCK or F_UNLCK."""

    owner: int
    start: int
    end: int
    type: int
    pid: int
    flock: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that the kernel reads and writes by itself (pyfuse3.FileInfo, and a *backing_id*); with *direct_io* only
    through mappings."""

    fh: int
    backing_id: int
    direct_io: bool
    keep_cache: bool = False
    nonseekable: bool = False
