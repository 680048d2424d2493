"""The canonical form of an adapter: equal adapters have equal bytes, whose SHA-256 is the adapter's version.

An adapter is a blob of its numbers, which names by their digests the blobs of what it may share: its layout, the locations
of its sparse cores, matrices. docs/store.md specifies the bytes.
"""

from overtone.adapters.canonical.decode import Sharing, decode
from overtone.adapters.canonical.encode import Encoded, encode
from overtone.adapters.canonical.known import Known
from overtone.adapters.canonical.stored import Sparse, StoredAdapter

__all__ = ["Encoded", "Known", "Sharing", "Sparse", "StoredAdapter", "decode", "encode"]
