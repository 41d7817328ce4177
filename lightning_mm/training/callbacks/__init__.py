"""Callbacks of every run: checkpoints, evaluation, run recorder, throughput, progress bar."""
