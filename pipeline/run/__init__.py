"""Runs jobs: what is checked before, what runs on Ray, what is told after."""
