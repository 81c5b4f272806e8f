"""Families of models: what differs between them, one module each."""
