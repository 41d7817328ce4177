"""Which layers are worth training: criteria, their significance, and the search for a range."""
