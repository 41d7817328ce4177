"""What a run shows: the HTML report and Weights & Biases. The only room that imports wandb and altair."""
