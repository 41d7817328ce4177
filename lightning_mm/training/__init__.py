"""The LightningModule, its checkpoints and metrics, and the choice of layers before training."""
