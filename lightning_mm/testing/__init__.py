"""Tiny random models of many families and tiny data, for tests of this package and of its users.

``python -m lightning_mm.testing FOLDER`` writes a model and data to try every verb with, offline and in seconds.
"""

from lightning_mm.testing.shapes import SHAPES, Shape, build_shape, shape
from lightning_mm.testing.tiny import FAMILIES, build_tiny
from lightning_mm.testing.tiny_data import build_tiny_data

__all__ = ["FAMILIES", "SHAPES", "Shape", "build_shape", "build_tiny", "build_tiny_data", "shape"]
