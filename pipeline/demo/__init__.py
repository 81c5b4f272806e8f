"""What `make demo` runs on: a small trained Awaker2.5-VL, drawn scenes it can answer about, and
photographs it cannot.
"""
