"""Families of models against the numbers of transformers."""
