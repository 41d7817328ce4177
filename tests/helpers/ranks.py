"""Processes that are the ranks of one run, as torchrun starts them.

Data flow: a module with arguments -> one process per rank -> they end, or what one of them printed is the error.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch_ranks(module: str, arguments: Sequence[Path], ranks: int = 2) -> None:
    """Run ``python -m module arguments...`` on some ranks, and wait for them.

    Raises:
        AssertionError: One of them failed; what it printed is the message.
        subprocess.TimeoutExpired: They wait for each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    running = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(command, env=own, text=True, **pipes))  # type: ignore[call-overload]
    try:
        for process in running:
            told, _ = process.communicate(timeout=240)
            assert process.returncode == 0, told
    finally:
        for process in running:
            process.kill()
