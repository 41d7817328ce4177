"""Records of tensors kept on disk by key: shared by epochs, ranks and runs, bounded, and never in the way of a run.

Data flow: tensors -> ``records`` (bytes) -> ``shards`` (files) -> ``catalogue`` (where they lie) -> tensors, joined by
``store``; ``identity`` says in which folder, ``room`` how much may be written.
"""

from lightning_mm.execution.cache.store.records import Kept
from lightning_mm.execution.cache.store.store import RecordStore, StoreStats

__all__ = ["Kept", "RecordStore", "StoreStats"]
