"""Benchmarks: one file a question. `make bench` runs them all and writes RESULTS.md from what they
measured.
"""
