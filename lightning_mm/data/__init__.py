"""Data: files of conversations to batches, their order, rejected samples, and probe sets."""
