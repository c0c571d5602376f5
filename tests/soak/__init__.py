"""The soak: three nodes under a mixed load while they are killed, crashed, cut off, moved and stopped at random.

``python -m tests.soak --minutes 30``; ``python -m tests.soak.cycles -n 1000`` mounts and unmounts again and again.
"""
