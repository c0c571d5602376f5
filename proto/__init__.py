"""Wire and disk formats of MXFS, each declared once (imported as ``mxfs_proto``)."""

PROTO_VERSION = 1
"""Version of every wire and disk format; a peer or record of another version is refused by name."""
