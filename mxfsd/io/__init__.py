"""MXFS."""
