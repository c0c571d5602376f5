"""The benchmark: the same work on native XFS, passthroughfs, MXFS homes with and without passthrough, an MXFS node."""
