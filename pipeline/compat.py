"""Makes the stock libraries import on every machine we support; imported before transformers or
qwen-vl-utils.
"""

import torch


def _declare_torchvision_operators() -> None:
    """Declare the schemas of torchvision's compiled operators where the compiled ones cannot load.

    torchvision's wheel on PyPI is linked against the CUDA build of torch. Beside a CPU-only torch
    its operators are missing and `import torchvision` dies at `operator torchvision::nms does not
    exist`, because it registers shape functions for them. qwen-vl-utils and transformers'
    Qwen2VLProcessor import torchvision but call neither operator, so the schemas are enough.
    """
    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # A Library that is collected takes its definitions with it.
    _kept_alive.append(library)


_kept_alive: list[torch.library.Library] = []
_declare_torchvision_operators()
