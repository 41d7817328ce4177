"""A cache of tensors on disk by key: shared by epochs, ranks and runs, bounded, and never a reason for a run to stop.

Data flow: tensors -> ``encoding`` (bytes) -> ``shards`` (files, and the index of what lies in them) -> tensors, joined
by ``store``; ``disk_limit`` says how much may be written, and removes what no process uses.
"""

from lightning_mm.execution.cache.store.encoding import StorageDtype
from lightning_mm.execution.cache.store.store import RecordStore, StoreStats

__all__ = ["RecordStore", "StorageDtype", "StoreStats"]
