"""The benchmark: the same work on native XFS, pyfuse3's passthroughfs, an MXFS home and another MXFS node."""
