"""Probe sets: rows with known answers that hidden states are probed with; drawn from files, saved and batched."""
