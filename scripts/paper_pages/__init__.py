"""Pages that set what three papers publish beside what this package finds: one item per figure or table."""
