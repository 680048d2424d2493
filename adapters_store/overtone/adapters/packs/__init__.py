"""Where the bytes of adapters are: packs, files and object storage. Knows digests, but neither adapters nor their ids."""

from overtone.adapters.packs.blobs import OWN_FILE_BYTES, PACK_BYTES, Blobs, BlobStats
from overtone.adapters.packs.compaction import Compaction
from overtone.adapters.packs.folder import StoreFolder, digest_of
from overtone.adapters.packs.index import BlobIndex, Leaving, PackFacts
from overtone.adapters.packs.place import OWN_FILE, Place
from overtone.adapters.packs.problem import Problem, Progress
from overtone.adapters.packs.remote import Remote
from overtone.adapters.packs.tier import RemoteStats

__all__ = [
    "OWN_FILE",
    "OWN_FILE_BYTES",
    "PACK_BYTES",
    "BlobIndex",
    "BlobStats",
    "Blobs",
    "Compaction",
    "Leaving",
    "PackFacts",
    "Place",
    "Problem",
    "Progress",
    "Remote",
    "RemoteStats",
    "StoreFolder",
    "digest_of",
]
