"""Activations of frozen parts, computed once per row and kept on disk."""
