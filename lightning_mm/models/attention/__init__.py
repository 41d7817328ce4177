"""Attention functions: short rows on CPUs, rows without padding, and interception of attention calls."""
