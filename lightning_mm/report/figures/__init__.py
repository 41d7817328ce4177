"""Charts, heat maps and maps of traces."""
