"""An object that is over there if anything of a store is: what tells a loss from another bucket."""

from __future__ import annotations

from overtone.adapters.packs.ledger import Ledger
from overtone.adapters.packs.remote import Remote
from overtone.errors import StoreFailed


def leave_mark(ledger: Ledger, remote: Remote) -> None:
    """Before the first upload of a store; later it is only looked for. Raises what `check_mark` raises."""
    if ledger.exists:
        check_mark(ledger, remote)
    else:
        remote.put(ledger.mark_name, [b"overtone\n"])
        ledger.save()


def check_mark(ledger: Ledger, remote: Remote) -> None:
    """Raises `StoreFailed` if the other side is not where the objects of this store are."""
    if remote.head(ledger.mark_name) is None:
        message = f"the object storage has no {ledger.mark_name}: it is not the one that this store has used"
        raise StoreFailed(message, field="remote")
