"""Hidden states out of the live model: hooks on its decoder blocks, pooled where they are, gone afterwards."""
