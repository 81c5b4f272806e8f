"""Tests that run whole programs, each with a Ray cluster of its own."""
