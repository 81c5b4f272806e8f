"""From a request to all that its prefill needs: visual tokens, rotary positions, and the experts of
all its layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.options import DecodeRoute
from pipeline.engine.types import GenerationError, Request
from pipeline.model.assemble import Model
from pipeline.model.ops import HostCopy, to_device
from pipeline.model.routing import expert_factors
from pipeline.picture import Picture
from pipeline.sound import Medium, Sound

#: Patches that the vision tower takes at once, and frames of the audio encoder. On a GPU they
#: bound its activations (about 1 GB for the 7B model in bfloat16), on a CPU they keep them in the
#: processor's cache.
ENCODE_PATCHES = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True)
class Encoded:
    """A request whose images went through the vision tower, and its sounds through the audio
    encoder, and whose experts are known.

    Attributes:
        visual: [visual tokens, hidden] on the model's device, those of sounds among them; empty
            without images and sounds, and once the prompt is in the cache.
        image_places: [visual tokens] int64, their places among the prompt's tokens.
        positions: [3, T] int64, rotary positions of the prompt.
        next_position: rotary position of the first new token.
        factors: [2, G, E + 1] on the model's device, the experts' factors for the prompt and for
            new tokens; None without an adapter.
        expert_weights: [2, G, E] float16, the routers' weights; None without an adapter.
        routes: [2, G] int8, the top expert of each router; empty without an adapter.
    """

    visual: Tensor
    image_places: np.ndarray
    positions: np.ndarray
    next_position: int
    factors: Tensor | None
    expert_weights: np.ndarray | None
    routes: np.ndarray

    @cached_property
    def decode_key(self) -> bytes | None:
        """Equal for requests whose new tokens take the same experts with the same weights; None
        without an adapter.
        """
        return None if self.expert_weights is None else self.expert_weights[1].tobytes()

    def without_visual(self) -> Encoded:
        """The same once the prompt is in the cache: visual tokens are the most that it holds."""
        # A tensor of its own: a slice would keep their memory.
        return replace(self, visual=self.visual.new_empty(0, self.visual.shape[1]))


_NO_ROUTES = np.zeros((2, 0), np.int8)


class Encoding:
    """Requests on their way through the vision tower and the routers; their routes are the only
    thing the host waits for.

    Args:
        requests: the requests, still without expert weights and routes.
        weights: [R, 2, G, E] float16 on the device; G and E are 0 without an adapter.
        routes: [R, 2, G] int8, the same.

    Attributes:
        visual_bytes: that the requests' visual tokens take on the device.
    """

    def __init__(self, requests: list[Encoded], weights: Tensor, routes: Tensor) -> None:
        self._requests = requests
        self.visual_bytes = sum(request.visual.nbytes for request in requests)
        self._routed = HostCopy(weights, routes)

    @property
    def ready(self) -> bool:
        """Whether `finish` returns at once."""
        return self._routed.ready

    def finish(self) -> list[Encoded]:
        """The encoded requests; waits for the device if they are not ready."""
        weights, routes = (tensor.numpy() for tensor in self._routed.wait())
        routed = weights.size > 0
        return [
            replace(request, expert_weights=w if routed else None, routes=top)
            for request, w, top in zip(self._requests, weights, routes, strict=True)
        ]


class VisionCache:
    """Visual tokens of the images seen last, by content: at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Tensor | None:
        """An image's visual tokens, if it was seen lately."""
        visual = self._held.get(key)
        if visual is not None:
            self._held.move_to_end(key)
        return visual

    def put(self, key: bytes, visual: Tensor) -> None:
        """Keep an image's visual tokens, at the cost of those not asked for longest."""
        if visual.nbytes > self._limit or key in self._held:
            return
        # A copy of its own: a view would keep the visual tokens of its whole batch.
        self._held[key] = visual.clone()
        self._bytes += visual.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._held.popitem(last=False)[1].nbytes


class Encoder:
    """Runs the vision tower and the routers.

    Args:
        model: the model.
        image_token_id: the id of the token that stands for a visual token.
        decode_route: which route new tokens take.
        cache_bytes: most bytes of visual tokens kept for images that come again.
    """

    def __init__(
        self,
        model: Model,
        image_token_id: int,
        decode_route: DecodeRoute,
        cache_bytes: int,
    ) -> None:
        self._model = model
        self._image_token_id = image_token_id
        self._decode_route = decode_route
        self._cache = VisionCache(cache_bytes)
        self.images_encoded = self.images_reused = 0

    def check(self, request: Request) -> None:
        """Refuse what would otherwise fail deep inside the model, or be answered wrongly.

        Raises:
            GenerationError: what is wrong with the request.
        """
        shape, ids = self._model.shape, request.input_ids
        if request.sounds and shape.audio is None:
            raise GenerationError("the request has sounds, but the model hears none")
        visual = sum(map(shape.tokens, request.media))
        if not 0 < len(ids) < shape.max_positions:
            raise GenerationError(
                f"{len(ids)} prompt tokens, expected 1 to {shape.max_positions - 1}"
            )
        if ids.min() < 0 or ids.max() >= shape.vocabulary:
            raise GenerationError(f"a token id lies outside the vocabulary of {shape.vocabulary}")
        if (placed := int((ids == self._image_token_id).sum())) != visual:
            raise GenerationError(
                f"{placed} image tokens in the prompt, but {visual} tokens in its images and sounds"
            )
        if not 0 <= request.span[0] < request.span[1] <= len(ids):
            raise GenerationError(
                f"the routing span {request.span} does not lie within {len(ids)} prompt tokens"
            )

    def at_once(self, requests: Iterable[Request]) -> int:
        """How many of the first requests should be encoded together: one at least, and as many as
        the vision tower takes at once.
        """
        left = ENCODE_PATCHES[self._model.device.type]
        count = 0
        for request in requests:
            left -= sum(map(self._model.shape.patches, request.media))
            if count and left < 0:
                break
            count += 1
        return count

    def encode(self, requests: Sequence[Request]) -> Encoding:
        """Launch the encoding of checked requests, without waiting for the device; equal images
        pass the tower once, and equal sounds the audio encoder.
        """
        model = self._model
        features = self._visual(requests)
        joined = [
            torch.cat([features[d] for d in r.digests]) if r.digests else None for r in requests
        ]
        # One product for the routes of all requests, all layers and both routes.
        places = [np.flatnonzero(request.input_ids == self._image_token_id) for request in requests]
        prefill_h, decode_h = [], []
        for request, visual, image_places in zip(requests, joined, places, strict=True):
            words = model.embeddings[to_device(request.input_ids.astype(np.int64), model.device)]
            start, end = request.span
            decode_h.append(words[start:end].mean(0))
            if visual is not None:
                words = words.index_copy(0, to_device(image_places, model.device), visual)
            prefill_h.append(words[start:end].mean(0))
        if self._decode_route == "prefill":
            decode_h = prefill_h
        routes = model.route(torch.stack([*prefill_h, *decode_h]))
        count = len(requests)
        factors = None
        weights, top = (
            torch.zeros(count, 2, 0, 0, dtype=torch.float16),
            torch.zeros(count, 2, 0, dtype=torch.int8),
        )
        if routes is not None and model.shape.adapter is not None:
            weights = routes.weights.view(2, count, *routes.weights.shape[1:]).transpose(0, 1)
            factors = expert_factors(weights, model.shape.adapter.scale).to(model.dtype)
            top = routes.top.to(torch.int8).view(2, count, -1).transpose(0, 1)
        nothing = torch.empty(0, model.shape.hidden, dtype=model.dtype, device=model.device)
        return Encoding(
            [
                Encoded(
                    visual=nothing if visual is None else visual,
                    image_places=image_places,
                    positions=positions,
                    next_position=following,
                    factors=None if factors is None else factors[index],
                    expert_weights=None,
                    routes=_NO_ROUTES,
                )
                for index, (visual, image_places, (positions, following)) in enumerate(
                    zip(joined, places, map(self._rope_positions, requests), strict=True)
                )
            ],
            weights,
            top,
        )

    def _rope_positions(self, request: Request) -> tuple[np.ndarray, int]:
        return self._model.shape.vision.positions(
            request.input_ids, request.images, self._image_token_id
        )

    def _visual(self, requests: Sequence[Request]) -> dict[bytes, Tensor]:
        """Tokens of all images and sounds of the requests, by digest."""
        visual: dict[bytes, Tensor] = {}
        fresh: dict[bytes, Medium] = {}
        for request in requests:
            for digest, medium in zip(request.digests, request.media, strict=True):
                known = visual.get(digest)
                if (
                    known is None
                    and digest not in fresh
                    and (known := self._cache.get(digest)) is not None
                ):
                    visual[digest] = known
                if known is not None or digest in fresh:
                    self.images_reused += 1
                else:
                    fresh[digest] = medium
        pictures = {key: one for key, one in fresh.items() if isinstance(one, Picture)}
        sounds = {key: one for key, one in fresh.items() if isinstance(one, Sound)}
        encoded: list[Tensor] = []
        if pictures:
            encoded += self._model.vision.encode(list(pictures.values()))
        if sounds:
            assert self._model.audio is not None
            encoded += self._model.audio.encode(list(sounds.values()))
        for digest, tokens in zip((*pictures, *sounds), encoded, strict=True):
            visual[digest] = tokens
            self._cache.put(digest, tokens)
        self.images_encoded += len(fresh)
        return visual
