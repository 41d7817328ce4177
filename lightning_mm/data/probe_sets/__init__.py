"""Rows that the layers are probed with: drawn, saved, and collated into batches."""
