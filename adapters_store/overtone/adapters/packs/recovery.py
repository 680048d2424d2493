"""What an interrupted process left is removed at the next start, in time that grows with the number of packs only."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from overtone.adapters.failures import operation
from overtone.adapters.packs import disk
from overtone.adapters.packs.folder import StoreFolder
from overtone.adapters.packs.index import PackFacts
from overtone.adapters.packs.own import OwnFiles

_log = logging.getLogger(__name__)


def recover(folder: StoreFolder, known: Sequence[PackFacts], own: OwnFiles) -> None:
    """Cuts packs at the ends that the index knows, removes packs that it does not know, own files that an intent names
    and it does not know, and all of tmp/. Raises `StoreFailed`."""
    ends = {folder.pack(facts.number): facts.end for facts in known}
    with operation("clean the adapter store"):
        for path in folder.packs.glob("*.pack"):
            if path not in ends:
                disk.unlink(path)
            elif (size := disk.size(path)) > ends[path]:
                handle = disk.open_write(path)
                try:
                    disk.truncate(handle, ends[path])
                finally:
                    disk.close(handle)
            elif size < ends[path]:
                _log.error("%s is shorter than it was: see `overtone store fsck`", path.name)
        own.recover()
        folder.clear_tmp()
