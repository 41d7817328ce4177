"""Attention functions of our own: short rows on CPUs, rows without padding, and interception for causal tools."""
