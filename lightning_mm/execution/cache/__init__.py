"""Activations of frozen parts, computed once per row and cached on disk."""
