"""What is written: results, and everything under `_run/`."""
