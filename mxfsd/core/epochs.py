"""Grant sequences of successive homes never overlap (pure)."""

_SEQ_BITS = 40


def first_seq(epoch: int) -> int:
    """Return the first grant sequence of the home of *epoch*: above all those of the epochs before."""
    return (epoch << _SEQ_BITS) + 1
