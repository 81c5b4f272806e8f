"""The model: checkpoint, prompt, vision tower, routing, experts, decoder. Knows neither Ray nor
Parquet.
"""
