"""Checkpoints that count only when a manifest written last says so.

Layout, below a run's ``checkpoints`` folder::

    <step>/state/…          orbax, one folder per leaf (plain zarr, so that a file names its leaf)
    <step>/manifest.json    leaves, file digests, identity of the run, ``extra``; written last

A folder without a whole manifest was interrupted and does not count. orbax restores flipped bits
without a word; here every file and every restored leaf is compared with its SHA-256.

With several processes all of them call ``save`` and ``restore``, on a folder that all of them see.
"""

from jlora.io.checkpoint.manifest import (
    check_run,
    discard_incomplete,
    discard_later,
    latest,
    steps,
)
from jlora.io.checkpoint.store import restore, restore_part, save

__all__ = [
    "check_run",
    "discard_incomplete",
    "discard_later",
    "latest",
    "restore",
    "restore_part",
    "save",
    "steps",
]
