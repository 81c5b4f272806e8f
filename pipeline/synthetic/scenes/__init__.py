"""Scenes that we draw, with their truth: what is asked about them, and Parquet shards of both."""
