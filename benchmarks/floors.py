"""The least time that a model's arithmetic and its reading of memory take."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import vision_of
from pipeline.model.shape import ModelShape


@dataclass(frozen=True)
class Floors:
    """The least time of each stage on this device: arithmetic over the shape.

    Attributes:
        shape: the model's sizes.
        flops: floating-point operations a second of a large product.
        bandwidth: bytes a second read from memory.
        itemsize: in a decode step, bytes of a number of the decoder's linear layers and of what
            they multiply: 2 of bfloat16, 1 where `model.quantize` rounds them. Tensor cores
            multiply those of one byte at twice the rate. What else there is has 2.
    """

    shape: ModelShape
    flops: float
    bandwidth: float
    itemsize: int = 2

    @property
    def projections(self) -> int:
        """Parameters of the decoder's linear layers."""
        s = self.shape
        attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
        return s.layers * (attention + 3 * s.hidden * s.mlp_width)

    @property
    def expert(self) -> int:
        """Parameters of one expert in all layers."""
        s = self.shape
        if s.adapter is None:
            return 0
        return (
            s.layers
            * s.adapter.rank
            * (s.hidden + s.heads * s.head_dim + 3 * (s.hidden + s.mlp_width))
        )

    @property
    def used(self) -> int:
        """Parameters that a new token passes: its own expert's and the global one's among them."""
        return self.projections + 2 * self.expert + self.shape.hidden * self.shape.vocabulary

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of a token, in bfloat16."""
        return 2 * 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim

    def vision_flops(self, patches: int) -> float:
        """Operations of the vision tower for one image."""
        v = vision_of(self.shape)
        block = 4 * v.width**2 + 2 * v.width * v.mlp_width
        merged = v.width * v.merge_size**2
        linear = v.depth * block + v.width * v.channels * v.temporal_patch_size * v.patch_size**2
        merger = (merged**2 + merged * self.shape.hidden) / v.merge_size**2
        return 2.0 * patches * (linear + merger) + 4.0 * v.depth * v.width * patches**2

    def prefill_flops(self, tokens: int) -> float:
        """Operations of the decoder for one prompt, with the request's own expert and the global
        one.
        """
        s = self.shape
        return (
            2.0 * tokens * (self.projections + 2 * self.expert)
            + 2.0 * s.layers * s.heads * s.head_dim * tokens**2
        )

    def request_flops(self, prompt: int, patches: int, new: int) -> float:
        """Operations of one request on a device whose memory is never waited for; attention to its
        answer left out.
        """
        return self.vision_flops(patches) + self.prefill_flops(prompt) + 2.0 * new * self.used

    def decode_seconds(self, batch: int, context: int) -> float:
        """A decode step: weights read once, or multiplied with, whichever takes longer; then keys
        and values.
        """
        s = self.shape
        head = s.hidden * s.vocabulary
        read: float = self.projections
        if s.adapter is not None:
            routed = s.adapter.experts * (1 - (1 - 1 / s.adapter.experts) ** batch)
            read += (routed + 1) * self.expert
        rate = self.flops * 2 / self.itemsize
        multiplied = (self.used - head) / rate + head / self.flops
        weights = max((self.itemsize * read + 2 * head) / self.bandwidth, 2.0 * batch * multiplied)
        return weights + batch * context * self.cache_bytes / self.bandwidth

    def request_seconds(self, visual: int, text: int, new: int, batch: int) -> float:
        """One request's share of a full device."""
        prompt = visual + text
        tower = self.vision_flops(visual * vision_of(self.shape).merge_size ** 2) / self.flops
        return (
            tower
            + self.prefill_flops(prompt) / self.flops
            + new * self.decode_seconds(batch, prompt + new // 2) / batch
        )
