"""The operations of the stacking layer, written against pyfuse3's interface.

Each has two ways. The **local** way, on the home, where this node's lock covers the operation: a few system calls on
the lower XFS, in one piece, no message. The **shipped** way, everywhere else: the home runs it (``mxfsd/home.py``).
What a reply says is kept only while the lock is held that came with it (same grant sequence).
"""

import asyncio
import errno
import functools
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import pyfuse3
import structlog
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT, RequestContext, SetattrFields

from mxfs_fuse.callers import caller, is_unmounting
from mxfs_fuse.channel.replies import LibfuseReplies, Replies
from mxfs_fuse.fileio import CAPABILITY, FileIO
from mxfs_fuse.filelocks import FileLock, FileLocks, held_of
from mxfs_fuse.link import OperationError
from mxfs_fuse.loss import may_be_redone
from mxfs_fuse.nodes import DirHandle, Node
from mxfs_fuse.ranges import Ranges
from mxfs_fuse.state import State, is_down
from mxfs_proto.errors import MxfsError
from mxfs_proto.filelocks import Held
from mxfs_proto.ops import NO_FID, Attr, Entry, Fid, Grant, Op, Valid, unpack_attr, unpack_entries
from mxfsd.io.lower import Lower, errno_of

log = structlog.get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ANYBODY = 0
_PRIVILEGED = stat.S_ISUID | stat.S_ISGID
_PAGE_OF_ENTRIES = 2048
_LEARN_AFTER = 16


def _errno_boundary(operation: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """The one place where our errors become the errno that the application sees."""
    name = operation.__name__

    @functools.wraps(operation)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        state = cast(Operations, args[0]).state
        if cast(Operations, args[0]).names_callers:
            # Set in any case: pyfuse3 serves one request after the other in the same task.
            caller.set(args[-1].pid if isinstance(args[-1], RequestContext) else 0)
        while True:
            lower = state.lower
            try:
                try:
                    return await operation(*args, **kwargs)
                except OSError as exc:
                    # A lower mount that is shut down under its home fails everything: that is no answer.
                    if name == "release" or not await may_be_redone(state, lower, errno_of(exc), name):
                        raise
            except FUSEError:
                raise
            except (OSError, MxfsError) as exc:
                raise FUSEError(errno_of(exc)) from None
            except Exception:
                # pyfuse3 would drop the request and its application would hang: a fault of ours is an error of that.
                log.exception("an operation failed", operation=name)
                raise FUSEError(errno.EIO) from None

    return guarded


class Operations(pyfuse3.Operations):
    """Every operation that pyfuse3 offers."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.io = FileIO(state)
        self._replies: Replies = LibfuseReplies()
        self.local_locks = False
        """File locks are left to the kernel, which knows those of this node only."""
        self.names_callers = True
        """Say ourselves who asks, of the requests that name somebody: a channel of our own does it for all."""
        self.file_locks = FileLocks(state)
        self.ranges = Ranges(state, self.io.writes)
        self._dirs: dict[int, DirHandle] = {}
        self._next_dir = 0
        self._root_attr: Attr | None = None
        """The root's attributes as they were seen last, for umount(8) while operations wait."""

    def use(self, replies: Replies) -> None:
        """Answer in these types, to a channel of our own, which says who asks."""
        self._replies = replies
        self.names_callers = False

    # -- replies ---------------------------------------------------------------------------------------------------

    def _entry(self, attr: Attr, attr_ttl: float, entry_ttl: float) -> EntryAttributes:
        entry = self._replies.entry(self.state.nodeid_of(attr[0]), attr, attr_ttl, entry_ttl)
        return cast(EntryAttributes, entry)

    def _absent(self, entry_ttl: float) -> EntryAttributes:
        """A negative entry: the kernel remembers that there is no such name."""
        if entry_ttl <= 0:
            raise FUSEError(errno.ENOENT)
        return cast(EntryAttributes, self._replies.absent(entry_ttl))

    def _looked_up(self, attr: Attr, parent: Node) -> EntryAttributes:
        """The reply to a lookup or creation: the kernel now counts one more reference."""
        state = self.state
        node = state.known(Fid(attr[0], attr[1]))
        node.nlookup += 1
        node.is_dir = stat.S_ISDIR(attr[2])
        if attr[2] & _PRIVILEGED:
            node.privileged = True
        ttl = state.ttl()
        # A just-looked-up inode may not exist in the kernel yet, where an invalidation would miss it (nodes.Node).
        attr_ttl = ttl if node.confirmed and not node.pinned and state.may_read(attr[0]) else 0.0
        return self._entry(attr, attr_ttl, state.entry_ttl(ttl, parent.fid.ino))

    # -- looking ---------------------------------------------------------------------------------------------------

    @_errno_boundary
    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        state = self.state
        parent = state.node(parent_inode)
        parent.confirmed = True
        if state.gate is not None:
            await state.pass_gate()
        ino = parent.fid.ino
        if state.may_read(ino):
            if state.lower is not None:
                try:
                    attr = state.lower.lookup(parent.fid, name)
                except FileNotFoundError:
                    return self._absent(state.entry_ttl(state.ttl(), ino))
                if state.may_read(attr.ino):
                    return self._looked_up(attr, parent)
            elif (
                parent.names is not None
                and parent.names_seq == state.locks.seq(ino)
                and (parent.names_whole or name in parent.names)
            ):
                fid = parent.names.get(name)
                if fid is None:
                    return self._absent(state.entry_ttl(state.ttl(), ino))
                node = state.nodes.get(fid.ino)
                if node is not None and node.fid == fid and state.attr_holds(node):
                    return self._looked_up(cast(Attr, node.attr), parent)
        return await self._ship_lookup(parent, name)

    async def _ship_lookup(self, parent: Node, name: bytes) -> EntryAttributes:
        state = self.state
        parent.misses += 1
        if parent.misses == _LEARN_AFTER and state.lower is None:
            await self._fetch_names(parent)  # so many names were asked for: know them all, and those that are not there
        changes, all_changes = parent.changes, state.changes
        try:
            grants, (attr,) = await state.link.ship(Op.LOOKUP, _ANYBODY, _ANYBODY, (*parent.fid, name), want_lock=True)
        except OperationError as exc:
            if exc.errno != errno.ENOENT:
                raise
            if parent.changes == changes:
                self._remember_name(parent, name, None, exc.grants)
            return self._absent(state.entry_ttl(state.ttl(), parent.fid.ino))
        reply = self._looked_up(attr, parent)
        node = state.nodes[attr.ino]
        if parent.changes == changes:
            self._remember_name(parent, name, node.fid, grants)
        if state.changes == all_changes:  # which inode it would be was not known before
            state.remember_attr(node, attr, grants, node.changes)
        return reply

    def _remember_name(self, parent: Node, name: bytes, fid: Fid | None, grants: list[Grant]) -> None:
        state = self.state
        if state.lower is not None:
            return
        ino = parent.fid.ino
        seq = state.locks.seq(ino)
        if any(grant.ino == ino and grant.seq == seq for grant in grants) and state.may_read(ino):
            if parent.names is None or parent.names_seq != seq:
                parent.names = {}
                parent.names_seq = seq
                parent.names_whole = False
            parent.names[name] = fid

    @_errno_boundary
    async def getattr(self, inode: InodeT, ctx: RequestContext | None = None) -> EntryAttributes:
        state = self.state
        node = state.node(inode)
        node.confirmed = True
        if state.gate is not None:
            if node.fid == state.root and self._root_attr is not None and is_unmounting(caller.get()):
                return self._entry(self._root_attr, 0.0, 0.0)
            await state.pass_gate()
        try:
            attr, held = await self._attr(node)
            if node.fid == state.root:
                self._root_attr = attr
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
            attr, held = self._removed_dir(node), False
        return self._entry(attr, state.ttl() if held and not node.pinned else 0.0, 0.0)

    def _removed_dir(self, node: Node) -> Attr:
        """Attributes of a directory that another node removed while it is open here; ESTALE where it is not open."""
        for handle in self._dirs.values():
            if handle.node is node:
                return handle.attr._replace(nlink=0)
        raise OSError(errno.ESTALE, "removed")

    async def _attr(self, node: Node) -> tuple[Attr, bool]:
        """Attributes, and whether a lock is held that lets the kernel keep them."""
        state = self.state
        ino = node.fid.ino
        if state.may_read(ino):
            if state.lower is not None:
                attr = state.lower.getattr(node.fid)
                if attr.nlink == 1 and (node.opens_r or node.opens_w) and state.lower.is_orphan(node.fid):
                    attr = attr._replace(nlink=0)
                return attr, True
            if state.attr_holds(node):
                return cast(Attr, node.attr), True
        changes = node.changes
        grants, (attr,) = await state.link.ship(Op.GETATTR, _ANYBODY, _ANYBODY, node.fid, want_lock=True)
        state.remember_attr(node, attr, grants, changes)
        return attr, state.granted(grants, ino) and state.may_read(ino)

    @_errno_boundary
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        state = self.state
        node = state.node(inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_read(node.fid.ino):
            return state.lower.readlink(node.fid)
        _, (target,) = await state.link.ship(Op.READLINK, _ANYBODY, _ANYBODY, node.fid)
        return cast(bytes, target)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel dropped references; an inode without any is forgotten, its lock given back."""
        state = self.state
        for inode, count in inode_list:
            ino = state.ino_of(inode)
            node = state.nodes.get(ino)
            if node is None:
                continue
            node.nlookup -= count
            if node.nlookup <= 0:
                state.forget(node)

    @_errno_boundary
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        state = self.state
        data = pyfuse3.StatvfsData()
        if state.gate is not None:
            if is_unmounting(caller.get()):
                return data
            await state.pass_gate()
        values: Sequence[int]
        if state.lower is not None:
            values = state.lower.statfs()
        else:
            _, values = await state.link.ship(Op.STATFS, _ANYBODY, _ANYBODY, ())
        (
            data.f_bsize,
            data.f_frsize,
            data.f_blocks,
            data.f_bfree,
            data.f_bavail,
            data.f_files,
            data.f_ffree,
            data.f_favail,
            data.f_namemax,
        ) = values
        return data

    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        """The kernel checks permissions itself (default_permissions)."""
        return True

    # -- changing attributes ---------------------------------------------------------------------------------------

    @_errno_boundary
    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        state = self.state
        node = state.node(inode)
        node.confirmed = True
        if state.gate is not None:
            await state.pass_gate()
        valid = 0
        valid |= Valid.MODE if fields.update_mode else 0
        valid |= Valid.UID if fields.update_uid else 0
        valid |= Valid.GID if fields.update_gid else 0
        valid |= Valid.SIZE if fields.update_size else 0
        valid |= Valid.ATIME if fields.update_atime else 0
        valid |= Valid.MTIME if fields.update_mtime else 0
        if fields.update_size and node.privileged and ctx.uid != 0:
            valid |= Valid.KILL_PRIV
        if fields.update_mode and attr.st_mode & _PRIVILEGED:
            node.privileged = True
        values = (
            valid,
            attr.st_mode if fields.update_mode else 0,
            attr.st_uid if fields.update_uid else 0,
            attr.st_gid if fields.update_gid else 0,
            attr.st_size if fields.update_size else 0,
            attr.st_atime_ns if fields.update_atime else 0,
            attr.st_mtime_ns if fields.update_mtime else 0,
        )
        new = await self._setattr(node, values)
        return self._entry(new, state.ttl() if state.may_read(node.fid.ino) and not node.pinned else 0.0, 0.0)

    async def _setattr(self, node: Node, values: tuple[int, ...]) -> Attr:
        state = self.state
        ino = node.fid.ino
        if state.lower is not None and state.may_change(ino):
            state.check_writable()
            new = state.lower.setattr(node.fid, *values)
            state.changed(ino)
            if node.opens_r or node.opens_w:
                return (await self._attr(node))[0]
            return new
        await self.io.writes.before_change(node)
        self.state.own_change(node)
        try:
            _, (shipped,) = await state.link.ship(Op.SETATTR, _ANYBODY, _ANYBODY, (*node.fid, *values))
        finally:
            node.end_seq = -1
        self.state.own_change(node)
        return cast(Attr, shipped)

    @_errno_boundary
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext, flags: int = 0) -> None:
        """*flags*: XATTR_CREATE or XATTR_REPLACE. (pyfuse3 looks whether there is one itself.)"""
        state = self.state
        node = state.node(inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_change(node.fid.ino):
            state.check_writable()
            state.lower.setxattr(node.fid, name, value, flags)
            state.changed(node.fid.ino)
            return
        await self.io.writes.before_change(node)
        self.state.own_change(node)
        node.no_capability_seq = -1
        await state.link.ship(Op.SETXATTR, _ANYBODY, _ANYBODY, (*node.fid, name, value, flags))
        node.no_capability_seq = -1
        self.state.own_change(node)

    @_errno_boundary
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        state = self.state
        node = state.node(inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_read(node.fid.ino):
            return state.lower.getxattr(node.fid, name)
        if name != CAPABILITY:
            _, (value,) = await state.link.ship(Op.GETXATTR, _ANYBODY, _ANYBODY, (*node.fid, name))
            return cast(bytes, value)
        return await self.io.capability(node)

    @_errno_boundary
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        state = self.state
        node = state.node(inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_read(node.fid.ino):
            return state.lower.listxattr(node.fid)
        _, (names,) = await state.link.ship(Op.LISTXATTR, _ANYBODY, _ANYBODY, node.fid)
        return cast(bytes, names).split(b"\0")[:-1]

    @_errno_boundary
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        state = self.state
        node = state.node(inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_change(node.fid.ino):
            state.check_writable()
            state.lower.removexattr(node.fid, name)
            state.changed(node.fid.ino)
            return
        await self.io.writes.before_change(node)
        self.state.own_change(node)
        await state.link.ship(Op.REMOVEXATTR, _ANYBODY, _ANYBODY, (*node.fid, name))
        self.state.own_change(node)

    # -- making ----------------------------------------------------------------------------------------------------

    async def _make(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext, op: Op, local: str, values: tuple[Any, ...]
    ) -> EntryAttributes:
        """MKNOD, MKDIR and SYMLINK, which differ in their arguments only."""
        state = self.state
        parent = state.node(parent_inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_change(parent.fid.ino):
            state.check_writable()
            attr = getattr(state.lower, local)(parent.fid, name, *values, ctx.uid, ctx.gid)
            state.changed(parent.fid.ino, attr.ino)
            return self._looked_up(attr, parent)
        return await self._ship_make(parent, name, ctx, op, values)

    async def _ship_make(
        self, parent: Node, name: bytes, ctx: RequestContext, op: Op, values: tuple[Any, ...]
    ) -> EntryAttributes:
        state = self.state
        state.own_change(parent)
        changes = parent.changes
        grants, (attr, after) = await state.link.ship(
            op, ctx.uid, ctx.gid, (*parent.fid, name, *values), want_lock=True
        )
        self._dir_changed(parent, changes, after, grants)
        reply = self._shipped_new(parent, name, attr, grants)
        if op is Op.MKDIR and state.granted(grants, attr.ino) and state.may_read(attr.ino):
            made = state.known(Fid(attr.ino, attr.gen))
            made.names, made.names_seq, made.names_whole = {}, state.locks.seq(attr.ino), True
        return reply

    def _dir_changed(self, parent: Node, changes: int, after: Attr, grants: list[Grant]) -> None:
        """A shipped change of *parent* has ended: its attributes are those *after* it, unless another change of this
        node's was under way (*changes*: as this one began), which they may lack."""
        alone = parent.changes == changes
        self.state.own_change(parent)
        if alone:
            self.state.remember_attr(parent, after, grants, parent.changes)

    def _shipped_new(self, parent: Node, name: bytes, attr: Attr, grants: list[Grant]) -> EntryAttributes:
        """What a shipped operation on *parent* made under *name* becomes known here."""
        fid = Fid(attr.ino, attr.gen)
        self._name_changed(parent, name, fid, grants)
        reply = self._looked_up(attr, parent)
        self.state.remember_attr(self.state.known(fid), attr, grants, self.state.known(fid).changes)
        return reply

    def _name_changed(self, parent: Node, name: bytes, fid: Fid | None, grants: list[Grant]) -> None:
        """An operation of this node's changed *name*: entries known so far stay known under the lock it kept."""
        if parent.names is not None:
            parent.names.pop(name, None)
        self._remember_name(parent, name, fid, grants)
        if fid is not None and (parent.names is None or name not in parent.names):
            parent.names_whole = False

    @_errno_boundary
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make(parent_inode, name, ctx, Op.MKNOD, "mknod", (mode, rdev))

    @_errno_boundary
    async def mkdir(self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._make(parent_inode, name, ctx, Op.MKDIR, "mkdir", (stat.S_IMODE(mode),))

    @_errno_boundary
    async def symlink(self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return await self._make(parent_inode, name, ctx, Op.SYMLINK, "symlink", (target,))

    @_errno_boundary
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        state = self.state
        node = state.node(inode)
        parent = state.node(new_parent_inode)
        if state.gate is not None:
            await state.pass_gate()
        unnamed = node.unnamed  # the daemon of the home, which knows what stands among the orphans, takes it from there
        if (
            state.lower is not None
            and not unnamed
            and state.may_change(parent.fid.ino)
            and state.may_change(node.fid.ino)
        ):
            state.check_writable()
            attr = state.lower.link(node.fid, parent.fid, new_name)
            state.changed(parent.fid.ino, node.fid.ino)
            return self._looked_up(attr, parent)
        state.own_change(node, parent)
        changes = parent.changes
        grants, (attr, after) = await state.link.ship(
            Op.LINK_UNNAMED if unnamed else Op.LINK,
            ctx.uid,
            ctx.gid,
            (*node.fid, *parent.fid, new_name),
            want_lock=True,
        )
        node.unnamed = False
        self.state.own_change(node)
        self._dir_changed(parent, changes, after, grants)
        return self._shipped_new(parent, new_name, attr, grants)

    @_errno_boundary
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        state = self.state
        parent = state.node(parent_inode)
        while True:
            if state.gate is not None:
                await state.pass_gate()
            if state.lower is not None and state.may_change(parent.fid.ino):
                state.check_writable()
                try:
                    fd, attr = state.lower.create(parent.fid, name, mode, ctx.uid, ctx.gid)
                except FileExistsError:
                    if flags & os.O_EXCL:
                        raise
                    found = state.lower.lookup(parent.fid, name)
                    if not stat.S_ISREG(found.mode):
                        raise
                    entry = self._looked_up(found, parent)
                    return await self.io.open(state.known(Fid(found.ino, found.gen)), flags, ctx.uid), entry
                state.changed(parent.fid.ino, attr.ino)
                entry = self._looked_up(attr, parent)
                node = state.known(Fid(attr.ino, attr.gen))
                return await self.io.open_new(node, flags, fd, ctx.uid), entry
            state.own_change(parent)
            changes = parent.changes
            grants, (existed, attr, after) = await state.link.ship(
                Op.CREATE, ctx.uid, ctx.gid, (*parent.fid, name, mode, flags), want_lock=True
            )
            self._dir_changed(parent, changes, after, grants)
            entry = self._shipped_new(parent, name, attr, grants)
            node = state.known(Fid(attr.ino, attr.gen))
            if existed:
                return await self.io.open(node, flags, ctx.uid), entry
            self.io.made(node, flags, grants)
            return await self.io.open_new(node, flags, -1, ctx.uid), entry

    @_errno_boundary
    async def tmpfile(
        self, parent_inode: InodeT, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """open(2) with O_TMPFILE: an open file that has no name (yet)."""
        state = self.state
        parent = state.node(parent_inode)
        while True:
            if state.gate is not None:
                await state.pass_gate()
            fd = -1
            if state.lower is not None and state.may_read(parent.fid.ino):
                state.check_writable()
                fd, attr = state.lower.tmpfile(parent.fid, mode, ctx.uid, ctx.gid)
                state.changed(attr.ino)
                grants: list[Grant] = []
            else:
                grants, (attr,) = await state.link.ship(
                    Op.TMPFILE, ctx.uid, ctx.gid, (*parent.fid, mode), want_lock=True
                )
            entry = self._looked_up(attr, parent)
            node = state.known(Fid(attr.ino, attr.gen))
            node.unnamed = True
            state.remember_attr(node, attr, grants, node.changes)
            self.io.made(node, flags, grants)
            try:
                return await self.io.open_new(node, flags, fd, ctx.uid), entry
            except OSError as exc:
                node.nlookup -= 1
                state.forget(node)
                if exc.errno != errno.ESTALE:
                    raise
                # A home that did not know that it is, or is about to be, open here has freed it: make another one.

    # -- removing and renaming -------------------------------------------------------------------------------------

    def _promise(self, parent: Node, name: bytes) -> Node | None:
        """The object that this node knows by that name, has not open, and does not open until told so."""
        fid = parent.names.get(name) if parent.names is not None else None
        node = self.state.nodes.get(fid.ino) if fid is not None else None
        if node is None or node.fid != fid or node.opens_r or node.opens_w or node.removing is not None:
            return None
        node.removing = asyncio.get_running_loop().create_future()
        return node

    def _promise_over(self, node: Node | None) -> None:
        if node is not None and node.removing is not None:
            node.removing.set_result(None)
            node.removing = None
            self.state.own_change(node)

    def _keep_orphan(self, kept: Fid) -> None:
        """The home kept an object because somebody may have it open: if that is not this node, say so."""
        if kept == NO_FID:
            return
        node = self.state.nodes.get(kept.ino)
        if node is None or node.fid != kept or not (node.opens_r or node.opens_w):
            self.state.reap(kept)

    def _local_victim(self, attr: Attr) -> Fid | None:
        """On the home, under EX: the object that must be kept because this node has it open."""
        node = self.state.nodes.get(attr.ino)
        if attr.nlink != 1 or stat.S_ISDIR(attr.mode) or node is None or not (node.opens_r or node.opens_w):
            return None
        return node.fid

    @_errno_boundary
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        state = self.state
        parent = state.node(parent_inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_change(parent.fid.ino):
            attr = state.lower.lookup(parent.fid, name)
            if state.may_free(attr.ino):
                state.check_writable()
                state.lower.unlink(parent.fid, name, self._local_victim(attr))
                state.changed(parent.fid.ino, attr.ino)
                self._link_lost(0 if stat.S_ISDIR(attr.mode) else attr.nlink)
                return
        state.own_change(parent)
        changes = parent.changes
        victim = self._promise(parent, name)
        known = victim.fid if victim is not None else NO_FID
        try:
            grants, (*kept, gone, links, after) = await state.link.ship(
                Op.UNLINK, ctx.uid, ctx.gid, (*parent.fid, name, *known), want_lock=True
            )
        finally:
            self._promise_over(victim)
        self._dir_changed(parent, changes, after, grants)
        self._name_changed(parent, name, None, grants)
        self._attr_changed(gone)
        self._link_lost(links)
        self._keep_orphan(Fid(*kept))

    def _link_lost(self, links: int) -> None:
        """An inode with so many links loses one. The kernel counts down its own, perhaps outdated, number, and refuses
        to link what it takes for gone: where links are left, have it look up names, and so link counts, again."""
        if links > 1 and self.state.kernel is not None and self.state.kernel.has_epoch:
            self.state.kernel.inc_epoch()

    def _attr_changed(self, *inos: int) -> None:
        """A shipped operation of this node's changed them, under locks that it keeps."""
        for ino in inos:
            node = self.state.nodes.get(ino)
            if node is not None:
                self.state.own_change(node)

    @_errno_boundary
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        state = self.state
        parent = state.node(parent_inode)
        if state.gate is not None:
            await state.pass_gate()
        if state.lower is not None and state.may_change(parent.fid.ino):
            attr = state.lower.lookup(parent.fid, name)
            if state.may_change(attr.ino):
                state.check_writable()
                state.lower.rmdir(parent.fid, name)
                state.lower.forget(attr.ino)
                state.changed(parent.fid.ino)
                return
        state.own_change(parent)
        changes = parent.changes
        grants, (after,) = await state.link.ship(Op.RMDIR, ctx.uid, ctx.gid, (*parent.fid, name), want_lock=True)
        self._dir_changed(parent, changes, after, grants)
        self._name_changed(parent, name, None, grants)

    @_errno_boundary
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        state = self.state
        old, new = state.node(parent_inode_old), state.node(parent_inode_new)
        if state.gate is not None:
            await state.pass_gate()
        if self._rename_here(old, name_old, new, name_new, flags):
            return
        state.own_change(old, new)
        changes, all_changes = (old.changes, new.changes), state.changes
        victim = self._promise(new, name_new) if not flags else None
        known = victim.fid if victim is not None else NO_FID
        moved = old.names.get(name_old) if old.names is not None else None
        try:
            grants, (*kept, renamed, replaced, links, attr, old_after, new_after) = await state.link.ship(
                Op.RENAME,
                ctx.uid,
                ctx.gid,
                (*old.fid, name_old, *new.fid, name_new, flags, *known),
                want_lock=True,
            )
            alone = state.changes == all_changes
        finally:
            self._promise_over(victim)
        self._dir_changed(old, changes[0], old_after, grants)
        if new is not old:
            self._dir_changed(new, changes[1], new_after, grants)
        for parent, name in ((old, name_old), (new, name_new)):
            if parent.names is not None:
                parent.names.pop(name, None)
                parent.names_whole = parent.names_whole and not flags and moved is not None
        if not flags:
            self._name_changed(old, name_old, None, grants)
            if moved is not None:
                self._name_changed(new, name_new, moved, grants)
        self._attr_changed(renamed, replaced)
        node = state.nodes.get(renamed)
        if attr and alone and node is not None:
            state.remember_attr(node, unpack_attr(attr), grants, node.changes)
        self._link_lost(links)
        self._keep_orphan(Fid(*kept))

    def _rename_here(self, old: Node, name_old: bytes, new: Node, name_new: bytes, flags: int) -> bool:
        """The local way; False where a lock is missing for it."""
        state = self.state
        lower = state.lower
        if lower is None or not (state.may_change(old.fid.ino) and state.may_change(new.fid.ino)):
            return False
        source = lower.lookup(old.fid, name_old)
        try:
            target = lower.lookup(new.fid, name_new)
        except FileNotFoundError:
            target = None
        touched = [source.ino] + ([target.ino] if target is not None else [])
        if not state.may_change(source.ino) or (target is not None and not state.may_free(target.ino)):
            return False
        state.check_writable()
        replaced = target if target is not None and not flags and target.ino != source.ino else None
        lower.rename(old.fid, name_old, new.fid, name_new, flags, self._local_victim(replaced) if replaced else None)
        if replaced is not None and stat.S_ISDIR(replaced.mode):
            lower.forget(replaced.ino)
        state.changed(old.fid.ino, new.fid.ino, *touched)
        if replaced is not None and not stat.S_ISDIR(replaced.mode):
            self._link_lost(replaced.nlink)
        return True

    # -- directories -----------------------------------------------------------------------------------------------

    @_errno_boundary
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        node = self.state.node(inode)
        if self.state.gate is not None:
            await self.state.pass_gate()
        attr, _held = await self._attr(node)
        self._next_dir += 1
        self._dirs[self._next_dir] = DirHandle(node, attr)
        return self._next_dir

    async def releasedir(self, fh: FileHandleT) -> None:
        del self._dirs[fh]

    @_errno_boundary
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        state = self.state
        handle = self._dirs[fh]
        if state.gate is not None:
            await state.pass_gate()
        if start_id == 0 or handle.entries is None:
            await self._list(handle)
        node = handle.node
        entries = handle.entries or []
        ttl = state.ttl()
        entry_ttl = state.entry_ttl(ttl, node.fid.ino) if handle.losses == state.losses else 0.0
        for index in range(start_id, len(entries)):
            name, attr = entries[index]
            if attr is None:  # the home lists names only, and looks each up when its turn comes
                try:
                    attr = cast(Lower, state.lower).lookup(node.fid, name)
                except FileNotFoundError:
                    continue
                except OSError:
                    if index > start_id and (state.lower is None or is_down(state.lower)):
                        return  # what was listed so far stands; the kernel asks for the rest
                    raise
                held = state.may_read(attr.ino)
            else:
                attr, held = self._listed_attr(attr)
            known = state.nodes.get(attr.ino)
            keeps = held and known is not None and known.confirmed and not known.pinned
            entry = self._entry(attr, ttl if keeps else 0.0, entry_ttl)
            if not self._replies.add(token, name, entry, index + 1):
                return
            named = node.names.get(name) if node.names is not None else None
            fid = Fid(attr.ino, attr.gen)
            listed = state.known(named if named == fid else fid)
            listed.nlookup += 1
            listed.is_dir = stat.S_ISDIR(attr.mode)

    def _listed_attr(self, attr: Attr) -> tuple[Attr, bool]:
        """Attributes for a listed entry, and whether they are under a lock: those of the listing may be old by now."""
        node = self.state.nodes.get(attr.ino)
        if node is not None and node.fid.gen == attr.gen and self.state.attr_holds(node):
            return cast(Attr, node.attr), True
        return attr, False

    async def _list(self, handle: DirHandle) -> None:
        """Take the listing that this pass goes through, under PR on the directory."""
        state = self.state
        node = handle.node
        handle.losses = state.losses
        if state.lower is not None and state.may_read(node.fid.ino):
            handle.entries = [(name, None) for name in state.lower.names(node.fid)]
            return
        handle.entries = await self._fetch_names(node)

    async def _fetch_names(self, node: Node) -> list[Entry]:
        """List a directory at the home; keep the names where one lock covered the whole listing."""
        state = self.state
        changes = node.changes
        entries: list[Entry] = []
        first: list[Grant] = []
        while True:
            after = entries[-1].name if entries else b""
            grants, (whole, packed) = await state.link.ship(
                Op.READDIR, _ANYBODY, _ANYBODY, (*node.fid, after, _PAGE_OF_ENTRIES), want_lock=True
            )
            first = first or grants
            page = unpack_entries(packed)
            entries.extend(page)
            if whole or not page:
                break
        held = state.granted(first, node.fid.ino) and state.may_read(node.fid.ino)
        if state.lower is None and held and node.changes == changes:
            # One lock from the first page to the last: nothing changed in between.
            node.names = {entry.name: state.fid_of(entry.attr) for entry in entries}
            node.names_seq = state.locks.seq(node.fid.ino)
            node.names_whole = True
        return entries

    @_errno_boundary
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        await self.io.fsync_object(self._dirs[fh])

    # -- regular files: see fileio.py ------------------------------------------------------------------------------

    @_errno_boundary
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        node = self.state.node(inode)
        node.confirmed = True
        info = await self.io.open(node, flags, ctx.uid)
        if flags & os.O_TRUNC:
            try:
                await self._setattr(
                    node, (Valid.SIZE | (Valid.KILL_PRIV if node.privileged and ctx.uid else 0), 0, 0, 0, 0, 0, 0)
                )
            except OSError:
                await self.io.release(info.fh)
                raise
        return info

    @_errno_boundary
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self.io.read(fh, off, size)

    @_errno_boundary
    async def write(self, fh: FileHandleT, off: int, buf: bytes, privileged: bool | None = None) -> int:
        """*privileged*: whoever writes may leave set-id bits as they are. None: the kernel does not say so."""
        return await self.io.write(fh, off, buf, privileged)

    @_errno_boundary
    async def flush(self, fh: FileHandleT) -> None:
        await self.io.flush(fh)

    @_errno_boundary
    async def release(self, fh: FileHandleT) -> None:
        await self.io.release(fh)

    async def sync_all(self) -> None:
        """Make durable what was written through this mount: the kernel hands sync(2) and syncfs(2) to no FUSE server of
        our kind. Raises OSError."""
        await self.state.pass_gate()
        await self.io.writes.commit_all()
        lower = self.state.lower
        if lower is not None:
            await self.state.in_lower(lower.syncfs)

    # -- what pyfuse3 has no requests for: see ranges.py -----------------------------------------------------------

    @_errno_boundary
    async def fallocate(self, fh: int, offset: int, length: int, mode: int, ctx: object) -> None:
        """fallocate(2)."""
        await self.state.pass_gate()
        await self.ranges.fallocate(self.io.handles[fh], offset, length, mode)

    @_errno_boundary
    async def lseek(self, fh: int, offset: int, whence: int, ctx: object) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        await self.state.pass_gate()
        return await self.ranges.lseek(self.io.handles[fh], offset, whence)

    @_errno_boundary
    async def copy_file_range(
        self, fh: int, offset: int, to_fh: int, to_offset: int, length: int, ctx: object
    ) -> int:  # fmt: skip
        """copy_file_range(2)."""
        await self.state.pass_gate()
        handles = self.io.handles
        return await self.ranges.copy(handles[fh], offset, handles[to_fh], to_offset, length)

    @_errno_boundary
    async def ioctl(self, inode: int, command: int, given: bytes, ctx: RequestContext) -> bytes:
        """ioctl(2) on a file or directory."""
        await self.state.pass_gate()
        return await self.ranges.ioctl(self.state.node(inode), command, given, ctx.uid)

    @_errno_boundary
    async def btime(self, inode: int, ctx: object) -> int:
        """When the object was made, in nanoseconds since the epoch (statx(2))."""
        await self.state.pass_gate()
        return await self.ranges.btime_ns(self.state.node(inode))

    # -- file locks ------------------------------------------------------------------------------------------------

    @_errno_boundary
    async def setlk(self, inode: int, fh: int, lock: FileLock, sleep: bool, ctx: object) -> None:
        """flock(2), fcntl(2) with F_SETLK or F_SETLKW, F_OFD_SETLK or F_OFD_SETLKW."""
        await self.file_locks.lock(self.state.node(inode).fid.ino, fh, held_of(lock), sleep)

    @_errno_boundary
    async def getlk(self, inode: int, fh: int, lock: FileLock, ctx: object) -> Held:
        """fcntl(2) with F_GETLK: what is in the way of *lock*, or *lock* with type F_UNLCK."""
        return await self.file_locks.get(self.state.node(inode).fid.ino, held_of(lock))

    @_errno_boundary
    async def flush_locks(self, fh: int, lock_owner: int) -> None:
        """A descriptor is closed: its process's POSIX locks of the file end."""
        handle = self.io.handles.get(fh)
        if handle is not None:
            await self.file_locks.closed(handle.ino, lock_owner)

    @_errno_boundary
    async def release_locks(self, fh: int, lock_owner: int, flock_unlock: bool) -> None:
        """An open file description is gone, with the locks that are its own. Called before release()."""
        handle = self.io.handles.get(fh)
        if handle is not None:
            await self.file_locks.released(handle.ino, fh, lock_owner, flock_unlock)

    @_errno_boundary
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.io.fsync(self.io.handles[fh])
