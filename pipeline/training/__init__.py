"""Training: a small base from nothing, and experts on any Qwen2-VL by the paper's three stages."""

import pipeline.compat  # noqa: F401 - before peft and transformers import torchvision
