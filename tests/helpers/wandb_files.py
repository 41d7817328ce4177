"""What an offline W&B run wrote, read back without W&B."""

import logging
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7


def records(directory: Path) -> list[Record]:
    """What W&B's own process wrote: LevelDB's log format (blocks of 32 KiB, pieces with a 7-byte head) of protobufs."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    data, at, found, piece = path.read_bytes(), HEADER, [], b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        piece += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(piece))
            piece = b""
    return found


def history(found: list[Record]) -> list[dict[str, str]]:
    rows = [record.history for record in found if record.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: i.value_json for i in row.item} for row in rows]


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lightning_mm" and r.levelno == logging.WARNING]
