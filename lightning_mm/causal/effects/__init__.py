"""What an intervention does to the answer: activation patching, knockout, ablation, attention flow, transplants."""
