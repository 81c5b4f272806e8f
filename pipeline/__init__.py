"""Offline captioning and visual question answering at dataset scale with Awaker2.5-VL."""
