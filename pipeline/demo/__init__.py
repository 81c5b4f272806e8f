"""What `make demo` runs on: bundled photographs, and a checkpoint made on the spot."""
