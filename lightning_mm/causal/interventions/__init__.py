"""What can be changed inside a run: hidden states, attention, inputs; and how a run is computed again from there."""
