"""What `scripts/bench.py` runs: the product, TRL's SFTTrainer and transformers' Trainer, measured by one stopwatch."""
