"""Peers of the engine, each in an environment of its own (`make peers`).

A worker is a process in a peer's environment. It imports this package, too, so nothing is imported
here.
"""
