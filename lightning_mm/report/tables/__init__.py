"""Which measures share a panel, and traces as tables."""
