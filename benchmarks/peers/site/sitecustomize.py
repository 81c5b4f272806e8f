"""On the path of every process of a peer's environment: declares torchvision's operators.

vLLM starts processes of its own, optimum loads Qwen2-VL's processor: both import torchvision beside
a CPU build of torch.
"""

import pipeline.compat  # noqa: F401
