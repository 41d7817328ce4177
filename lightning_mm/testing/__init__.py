"""Tiny random models of many families, for tests of this package and of its users."""

from lightning_mm.testing.tiny import FAMILIES, build_tiny

__all__ = ["FAMILIES", "build_tiny"]
