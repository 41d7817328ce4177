"""What every room may use: errors, decisions, estimates, metric names, the run directory, files and ranks."""
