"""The system calls that Python's os module lacks, through ctypes; each raises OSError with the call's errno.

Sources: fsopen(2), fsconfig(2), fsmount(2), open_by_handle_at(2), setfsuid(2), renameat2(2), linkat(2), capset(2),
<linux/mount.h>, <linux/securebits.h>, <linux/capability.h>, fs/xfs/xfs_export.h for the layout of an XFS file handle.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_SYS_RENAMEAT2 = 316
_SYS_STATX = 332
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_NODEV = 4
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSCONFIG_CMD_CREATE_EXCL = 8

_AT_EMPTY_PATH = 0x1000
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_SYNCHRONOUS = 1 << 4
MS_DIRSYNC = 1 << 7
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2

XFS_HANDLE_TYPE = 0x81
"""FILEID_INO32_GEN with XFS_FILEID_TYPE_64FLAG: the handle is (u64 inode, u32 generation), host byte order."""

_CAP_HEADER = Struct("=Ii").pack(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_CAP_DATA = Struct("=6I")  # effective, permitted, inheritable; the same of capabilities 32 and up
_CAP_FSETID = 1 << 4

_STATX_BTIME = 0x800
_STATX_BTIME_AT = 80
_STATX_TIME = Struct("=qI")

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_MEMORY = 32 << 20
_LARGEST_KEPT = 4 << 20

_HANDLE = Struct("=IiQI")  # handle_bytes, handle_type, inode, generation
_HANDLE_BYTES = 12
_HANDLE_ROOM = 128


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def keep_freed_memory() -> None:
    """Keep a few MiB that were freed for the next buffers (mallopt(3)).

    glibc gives a buffer of a large message back to the kernel each time, and a page fault for each of its pages costs
    more than what is done with the data, in a virtual machine above all.
    """
    for option, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _KEPT_MEMORY)):
        if _libc.mallopt(option, size) != 1:
            raise OSError(0, f"mallopt {option} {size}")


def _fs_messages(fd: int) -> str:
    """Return what the kernel logged into the file system context *fd* (fsopen(2), "e text" lines)."""
    lines = []
    while True:
        try:
            lines.append(os.read(fd, 4096).decode(errors="replace").strip())
        except OSError:
            return "; ".join(line[2:] if line[1:2] == " " else line for line in lines)


def mount_detached(source: str, readonly: bool, *, exclusive: bool = True) -> int:
    """Mount the XFS on *source* in no namespace; return the mount's descriptor (a directory, not O_PATH).

    *exclusive*: never share the superblock of a mount that this kernel has already. The kernel unmounts when the last
    descriptor into the mount closes. Device files do not open (EACCES): they would be devices of this host.
    Raises OSError (EBUSY: this kernel has the device or its uuid mounted already; EUCLEAN: XFS refuses the image).
    """
    ctx = _check(_libc.syscall(_SYS_FSOPEN, b"xfs", _FSOPEN_CLOEXEC), "fsopen")
    try:
        pairs: list[tuple[int, bytes, bytes | None]] = [(_FSCONFIG_SET_STRING, b"source", os.fsencode(source))]
        if readonly:
            pairs.append((_FSCONFIG_SET_FLAG, b"ro", None))
        for command, key_b, value_b in pairs:
            _check(_libc.syscall(_SYS_FSCONFIG, ctx, command, key_b, value_b, 0), f"fsconfig {key_b.decode()}")
        command = _FSCONFIG_CMD_CREATE_EXCL if exclusive else _FSCONFIG_CMD_CREATE
        result = _libc.syscall(_SYS_FSCONFIG, ctx, command, None, None, 0)
        if result < 0 and exclusive and ctypes.get_errno() in (22, 95):  # EINVAL, EOPNOTSUPP: before Linux 6.6
            result = _libc.syscall(_SYS_FSCONFIG, ctx, _FSCONFIG_CMD_CREATE, None, None, 0)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"mounting XFS on {source}: {os.strerror(code)} {_fs_messages(ctx)}".rstrip())
        mnt = _check(_libc.syscall(_SYS_FSMOUNT, ctx, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NODEV), "fsmount")
    finally:
        os.close(ctx)
    try:  # fsmount's descriptor is O_PATH; open_by_handle_at wants a real one
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mnt)
    finally:
        os.close(mnt)


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """mount(2); *flags* are MS_*. Raises OSError."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data)), f"mounting {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmounting {target}")


def mount_virtual(kind: str) -> int:
    """Mount a file system without a device in no namespace; return the mount's descriptor (O_PATH). Raises OSError."""
    ctx = _check(_libc.syscall(_SYS_FSOPEN, os.fsencode(kind), _FSOPEN_CLOEXEC), f"fsopen {kind}")
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, ctx, _FSCONFIG_CMD_CREATE, None, None, 0), f"mounting {kind}")
        return _check(_libc.syscall(_SYS_FSMOUNT, ctx, _FSMOUNT_CLOEXEC, 0), "fsmount")
    finally:
        os.close(ctx)


def generation_at(dir_fd: int, name: bytes) -> int:
    """Return the XFS generation of *name* under *dir_fd* (of *dir_fd* itself where name is empty)."""
    buf = ctypes.create_string_buffer(_HANDLE_ROOM)
    _HANDLE.pack_into(buf, 0, _HANDLE_ROOM - 8, 0, 0, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    _check(
        _libc.name_to_handle_at(dir_fd, name, buf, ctypes.byref(mount_id), flags),
        "name_to_handle_at",
    )
    size, kind, _ino, generation = _HANDLE.unpack_from(buf, 0)
    if kind != XFS_HANDLE_TYPE or size != _HANDLE_BYTES:
        raise OSError(95, f"unexpected file handle type {kind:#x} of {size} bytes: not an XFS handle")
    return int(generation)


def open_by_handle(mount_fd: int, ino: int, generation: int, flags: int) -> int:
    """Open the object (inode, generation) of the mount; ESTALE when it no longer exists."""
    handle = _HANDLE.pack(_HANDLE_BYTES, XFS_HANDLE_TYPE, ino, generation)
    fd = _libc.open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)


def link_fd(fd: int, dir_fd: int, name: bytes) -> None:
    """Make *name* under *dir_fd* a hard link to the object open at *fd* (linkat(2) with AT_EMPTY_PATH)."""
    _check(_libc.linkat(fd, b"", dir_fd, name, _AT_EMPTY_PATH), "linkat")


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2): RENAME_NOREPLACE = 1, RENAME_EXCHANGE = 2."""
    _check(_libc.syscall(_SYS_RENAMEAT2, old_dir, old, new_dir, new, flags), "renameat2")


def keep_caps_across_fsuid() -> None:
    """Let setfsuid keep this thread's capabilities (SECBIT_NO_SETUID_FIXUP).

    The kernel of the node where the caller runs has checked permissions (default_permissions); here the ids only
    decide who owns what is created.
    """
    _check(_libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "prctl(PR_SET_SECUREBITS)")


@contextmanager
def without_fsetid() -> Iterator[None]:
    """Have this thread's effective capabilities lack CAP_FSETID within a with block (capget(2), capset(2))."""
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    _check(_libc.capget(_CAP_HEADER, data), "capget")
    before = _CAP_DATA.unpack(data.raw)
    lacking = _CAP_DATA.pack(before[0] & ~_CAP_FSETID, *before[1:])
    _check(_libc.capset(_CAP_HEADER, lacking), "capset")
    try:
        yield
    finally:
        _check(_libc.capset(_CAP_HEADER, data), "capset")


def set_fs_ids(uid: int, gid: int) -> None:
    """Set this thread's file system ids (setfsuid(2), setfsgid(2): they report no error)."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); *mode* is FALLOC_FL_*."""
    _check(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)), "fallocate")


def btime_ns(fd: int) -> int:
    """Return when the object open at *fd* was made, in ns since the epoch (statx(2)). EOPNOTSUPP: nobody knows."""
    buf = ctypes.create_string_buffer(256)
    _check(_libc.syscall(_SYS_STATX, fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buf), "statx")
    if not int.from_bytes(buf.raw[:4], "little") & _STATX_BTIME:
        raise OSError(95, "the file system has no birth times")
    seconds, ns = _STATX_TIME.unpack_from(buf, _STATX_BTIME_AT)
    return int(seconds * 1_000_000_000 + ns)


def syncfs(fd: int) -> None:
    """Write back the whole file system that *fd* is on and wait (syncfs(2))."""
    _check(_libc.syncfs(fd), "syncfs")
