"""The Ray actors of a job: CPU actors that prepare rows, replicas that answer them, and one that
counts.
"""
