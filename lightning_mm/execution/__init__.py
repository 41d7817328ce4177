"""How one training step runs: techniques applied in a written order, the loss, the cache of frozen activations."""
