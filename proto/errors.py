"""The four error families; each carries the errno that the FUSE boundary answers with."""

import errno


class MxfsError(Exception):
    """Base of the families. ``errno`` is the code an application would see."""

    errno: int = errno.EIO

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.errno = code


class MisuseError(MxfsError):
    """We called something wrongly: a bug of ours or a bad argument; nothing was changed."""

    errno = errno.EINVAL


class PeerError(MxfsError):
    """A peer (another node, the other end of a socket) sent what the protocol does not allow."""

    errno = errno.EPROTO


class Refusal(PeerError):
    """A peer will not work with us, or we with it, for a reason that another try does not change."""


class MediaError(MxfsError):
    """A record on the disk is torn, foreign or of another version."""

    errno = errno.EUCLEAN


class IoFailure(MxfsError):
    """A device, socket or system call failed."""

    errno = errno.EIO
