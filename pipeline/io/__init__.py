"""Reading shards and writing results: knows storage, Parquet and Ray Data's interfaces, neither
model nor engine.
"""
