"""Offline captioning and visual question answering at dataset scale with Awaker2.5-VL."""

__version__ = "0.1.0"
