"""Persistent reservations: who may read and write the shared disk, and how one node shuts another out.

``spc`` and ``sense`` (pure) have the formats, ``keys`` (pure) our reservation keys, ``errors`` the exceptions; ``scsi``
(over ``sgio`` or ``iscsi``) and ``blockpr`` speak to one path to the disk; ``reservations`` has the rules that make a
fence safe; ``probe`` finds out how to reach the reservations of a device. ``docs/fencing.md`` explains the whole.
"""
