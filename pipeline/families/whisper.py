"""Whisper's encoder with a projector behind it: what Megrez hears sounds with.

Sources: infinigence/Infini-Megrez-Omni, vllm_demo/megrezo.py (`AudioEncoder`), which is openai's
Whisper but for what stands behind its blocks; log-mel spectrograms and numbers of tokens as in the
training code MachineGunLin/Megatron-LM (commit 0b71b6e3), megatron/core/models/multimodal/utils.py,
which are those of openai's Whisper and of transformers' `WhisperFeatureExtractor`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe, as_is, stacked_rows
from pipeline.model.ops import to_device
from pipeline.model.shape import AudioShape
from pipeline.model.vision import Affine, Blocks, LayerNorm
from pipeline.sound import RATE, Sound

#: Samples of a Fourier transform, and from one frame of a spectrogram to the next.
WINDOW, HOP = 400, 160
#: Frames that the second convolution makes one of, and then the pooling.
STRIDE, POOLED = 2, 2
#: Epsilon of all norms: torch's own, which the released code leaves as it is.
NORM_EPS = 1e-5
#: Learned vectors before and behind a sound's own.
ENDS = 2

#: Names of a block's parts: ours, and theirs behind `blocks.<number>.`.
_BLOCK = {
    "norm1": "attn_ln",
    "proj": "attn.out",
    "norm2": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


def frames_of(samples: int) -> int:
    """Frames behind the convolutions of a sound of so many samples."""
    return (samples // HOP + 1) // STRIDE


@dataclass(frozen=True)
class WhisperShape(AudioShape):
    """Sizes of the encoder.

    Attributes:
        mels: bands of a spectrogram.
        places: learned positions: frames behind the convolutions, at most.
        depth: blocks.
        hidden: width of what the projector gives, which is the decoder's.
    """

    mels: int
    places: int
    width: int
    heads: int
    depth: int
    hidden: int

    @property
    def most_samples(self) -> int:
        """Samples of the longest sound: Whisper's 30 seconds."""
        return self.places * STRIDE * HOP

    @property
    def least_samples(self) -> int:
        """Samples of the shortest sound, which has one token of its own."""
        return (STRIDE * POOLED - 1) * HOP

    def tokens(self, sound: Sound) -> int:
        """Tokens of a sound, with those before and behind it."""
        return self.frames(sound) // POOLED + ENDS

    def frames(self, sound: Sound) -> int:
        """Frames that its blocks take for a sound."""
        return frames_of(len(sound.samples))

    def batch_bytes(self, frames: int, dtype: torch.dtype) -> int:
        """Bytes that it has alive at once: spectrograms with what the first convolution makes of
        them, the residual stream, and queries, keys and values or the MLP's hidden states.
        """
        convolved = STRIDE * (4 * self.mels + 2 * self.width)
        a_frame = max(convolved + 2 * self.width, 12 * self.width)
        return frames * a_frame * dtype.itemsize

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor by canonical name, with its shape."""
        width, at = self.width, "audio_tower"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.conv1.weight": (width, self.mels, 3),
            f"{at}.conv1.bias": (width,),
            f"{at}.conv2.weight": (width, width, 3),
            f"{at}.conv2.bias": (width,),
            f"{at}.positional_embedding": (self.places, width),
        }
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_ln", "mlp_ln"), (width,))
        sizes |= dict.fromkeys([f"attn.{name}" for name in _ATTENTION], (width, width))
        sizes |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
        for block in range(self.depth):
            for name, size in sizes.items():
                shapes[f"{at}.blocks.{block}.{name}.weight"] = size
                if name != "attn.key":
                    shapes[f"{at}.blocks.{block}.{name}.bias"] = size[:1]
        shapes |= dict.fromkeys((f"{at}.ln_post.weight", f"{at}.ln_post.bias"), (width,))
        shapes |= {f"{at}.proj.weight": (hidden, width), f"{at}.proj.bias": (hidden,)}
        shapes[f"{at}.audio_bos_eos_token.weight"] = (ENDS, hidden)
        return shapes

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors; none has a name that Megrez's checkpoints have."""
        at = "audio_tower"
        renamed = {name: name for name in ("conv1", "conv2", "proj")} | {"norm": "ln_post"}
        for block in range(self.depth):
            for ours, theirs in _BLOCK.items():
                renamed[f"blocks.{block}.{ours}"] = f"blocks.{block}.{theirs}"
        for ours, theirs in renamed.items():
            for part in ("weight", "bias"):
                yield Recipe(f"audio.{ours}.{part}", (f"{at}.{theirs}.{part}",), as_is)
        for block in range(self.depth):
            sources = [f"{at}.blocks.{block}.attn.{name}" for name in ("query", "key", "value")]
            weights = tuple(f"{source}.weight" for source in sources)
            yield Recipe(f"audio.blocks.{block}.qkv.weight", weights, stacked_rows)
            biases = (f"{sources[0]}.bias", f"{sources[2]}.bias")
            yield Recipe(f"audio.blocks.{block}.qkv.bias", biases, _with_none_for_keys)
        yield Recipe("audio.positions", (f"{at}.positional_embedding",), as_is)
        yield Recipe("audio.ends", (f"{at}.audio_bos_eos_token.weight",), as_is)

    def assemble(self, parts: Parts) -> WhisperEncoder:
        """Put the encoder together of its serving tensors."""
        blocks = (parts.block(f"audio.blocks.{i}", NORM_EPS) for i in range(self.depth))
        weights = [parts.take(f"audio.{name}.weight") for name in ("conv1", "conv2")]
        biases = [parts.take(f"audio.{name}.bias") for name in ("conv1", "conv2")]
        device = weights[0].device
        return WhisperEncoder(
            shape=self,
            window=torch.hann_window(WINDOW).to(device),
            bands=mel_bands(self.mels).to(device),
            convolutions=tuple(zip(weights, biases, strict=True)),
            positions=parts.take("audio.positions"),
            blocks=Blocks(tuple(blocks), self.heads, "gelu"),
            norm=parts.norm("audio.norm", NORM_EPS),
            proj=parts.affine("audio.proj"),
            ends=parts.take("audio.ends"),
        )


_ATTENTION = ("query", "key", "value", "out")


def _with_none_for_keys(queries: Tensor, values: Tensor) -> Tensor:
    """Biases of queries, keys and values below one another: keys have none."""
    return torch.cat([queries, torch.zeros_like(queries), values])


def mel_bands(count: int) -> Tensor:
    """What each frequency gives to each band, [count, frequencies] float32: Slaney's mel scale up
    to half of `RATE`, each band of the same area.
    """
    from transformers.audio_utils import mel_filter_bank

    bands = mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1,
        num_mel_filters=count,
        min_frequency=0.0,
        max_frequency=RATE / 2,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(np.ascontiguousarray(bands.T, dtype=np.float32))


def log_mel(samples: Tensor, window: Tensor, bands: Tensor, most: int) -> Tensor:
    """The log-mel spectrogram of a sound that silence follows up to `most` samples, float32
    [bands, frames]: at least as many frames as anything is heard in, and three more, or all.

    Whisper's: log10 of the bands' power, cut off at 1e-10 and at 8 below the loudest, plus 4,
    divided by 4.

    Args:
        samples: [n] float32, from -1 to 1.
        window: [`WINDOW`] float32.
        bands: see `mel_bands`.
        most: samples of the longest sound.
    """
    # Frames of nothing but silence have the same value, whatever their number.
    whole = min(most, HOP * (len(samples) // HOP + 5) + WINDOW)
    padded = F.pad(samples, (0, whole - len(samples)))
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)
    power = bands @ spectrum[:, :-1].abs() ** 2
    levels = power.clamp(min=1e-10).log10()
    return (torch.maximum(levels, levels.max() - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class WhisperEncoder:
    """The encoder and its projector with their weights.

    Attributes:
        window: [`WINDOW`] float32, Hann's.
        bands: see `mel_bands`.
        convolutions: weight and bias of each of the two.
        positions: [places, width].
        norm: behind the pooling.
        ends: [2, hidden], what stands before and behind a sound.
    """

    shape: WhisperShape
    window: Tensor
    bands: Tensor
    convolutions: tuple[tuple[Tensor, Tensor], ...]
    positions: Tensor
    blocks: Blocks
    norm: LayerNorm
    proj: Affine
    ends: Tensor

    def encode(self, sounds: Sequence[Sound]) -> list[Tensor]:
        """Encode sounds; nothing here waits for the device.

        Args:
            sounds: of `least_samples` to `most_samples` each.

        Returns:
            For each [tokens, hidden of the decoder].
        """
        lengths = [self.shape.frames(sound) for sound in sounds]
        x = torch.cat([self._convolved(sound) for sound in sounds])
        ((x, delta),) = deque(self.blocks.states(x, lengths), maxlen=1)
        x = x + delta
        # Of an odd number of frames the last one is in no pair.
        pairs = [
            part[: len(part) // POOLED * POOLED].unflatten(0, (-1, POOLED)).mean(1)
            for part in x.split(lengths)
        ]
        _, normed = self.norm.add_norm(torch.cat(pairs), None)
        begin, end = self.ends[:1], self.ends[1:]
        tokens = self.proj.linear(normed).split([len(pair) for pair in pairs])
        return [torch.cat([begin, own, end]) for own in tokens]

    def _convolved(self, sound: Sound) -> Tensor:
        """What the blocks take of a sound, [frames, width]."""
        count = self.shape.frames(sound)
        samples = to_device(sound.samples.astype(np.float32) / 2**15, self.positions.device)
        mel = log_mel(samples, self.window, self.bands, self.shape.most_samples)
        # The released code cuts the spectrograms of a conversation off where its longest sound
        # ends: of that one, the first convolution sees zeros behind, which are not silence.
        x = mel[None, :, : STRIDE * count + sound.padded].to(self.positions.dtype)
        for stride, (weight, bias) in enumerate(self.convolutions, 1):
            x = F.gelu(F.conv1d(x, weight, bias, stride=stride, padding=1))
        return x[0, :, :count].T + self.positions[:count]
