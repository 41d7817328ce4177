"""What a run will cost before it starts: FLOPs, memory, time and devices."""
