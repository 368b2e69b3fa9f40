"""The nets of `step` and of `overhead`, in plain JAX: ResNets and ConvNeXts.

Images are NHWC, filters HWIO, and every convolution is `lax.conv_general_dilated`, which is
what `install()` changes. The ResNets are those of He et al. (arXiv:1512.03385) with projections
of option B: 7x7 stem of stride 2, max-pooling, four stages. ResNet-50 strides in the 3x3
convolution of a bottleneck, as everyone's does. ConvNeXt is that of
Liu et al. (arXiv:2201.03545) in their smallest size and in that which timm calls Atto. Its 1x1
convolutions are matrix products over the channels, as in the authors' code, so they are no
convolutions here either.

Batch norm is in training mode; running means, which no gradient depends on, are left out. The
scale of ConvNeXt's layers starts at 1 instead of 1e-6, at which float32 would hide an error in
the gradient of a block behind its residual connection.

In another dtype than float32 parameters stay float32 and are cast where they are used;
statistics of norms and the loss are float32, all else has that dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CLASSES = 1000
IMAGE_MULTIPLE = 32  # what the strides of either net multiply to

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Net:
    """A net that classifies images with three channels.

    Attributes:
        title: its name in print.
        widths: channels of each stage.
        depths: blocks of each stage.
        init: makes the parameters from (generator, widths, depths).
        logits: [N, H, W, 3] images under those parameters to [N, CLASSES].
        dtype: of activations and of the parameters that meet them.
        smooth_logits: the same net with smooth functions in the place of ReLU and the
            largest of a window, None if it has neither.
    """

    title: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    init: Callable[[np.random.Generator, Sequence[int], Sequence[int]], Params]
    logits: Callable[[Params, jax.Array], jax.Array]
    dtype: str = "float32"
    smooth_logits: Callable[[Params, jax.Array], jax.Array] | None = None

    def smooth(self) -> Net:
        """A net of the same convolutions, whose gradient no last bit turns on or off."""
        return dataclasses.replace(self, logits=self.smooth_logits or self.logits)

    def params(self, seed: int) -> Params:
        """Random float32 parameters, as NumPy arrays."""
        return self.init(np.random.default_rng(seed), self.widths, self.depths)

    def loss(self, params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        """The mean cross-entropy of a batch."""
        used = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        logits = self.logits(used, jnp.asarray(images, self.dtype))
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))


def _filter(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal values of variance 2 / fan-in; the last dimension is that of the outputs."""
    values = rng.standard_normal(shape, dtype=np.float32)
    return values * np.sqrt(2 / np.prod(shape[:-1]), dtype=np.float32)


def _affine(channels: int) -> Params:
    """A norm's scale and offset."""
    return {"scale": np.ones(channels, np.float32), "offset": np.zeros(channels, np.float32)}


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> Params:
    return {"w": _filter(rng, inputs, outputs), "b": np.zeros(outputs, np.float32)}


def _conv(x: jax.Array, w: jax.Array, stride: int, pad: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _norm(p: Params, x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    normal = centred * (lax.rsqrt(variance + epsilon) * p["scale"]) + p["offset"]
    return normal.astype(x.dtype)


def _batch_norm(p: Params, x: jax.Array) -> jax.Array:
    return _norm(p, x, (0, 1, 2), 1e-5)


def _layer_norm(p: Params, x: jax.Array) -> jax.Array:
    return _norm(p, x, (-1,), 1e-6)


def _linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


_EXPANSION = 4  # of a bottleneck's channels by its last convolution


def _init_resnet(
    rng: np.random.Generator,
    widths: Sequence[int],
    depths: Sequence[int],
    bottleneck: bool = False,
) -> Params:
    def block(inputs: int, width: int) -> Params:
        outputs = width * _EXPANSION if bottleneck else width
        shapes = [(3, 3, inputs, width), (3, 3, width, width)]
        if bottleneck:
            shapes = [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, outputs)]
        params: Params = {
            "convs": [_filter(rng, *shape) for shape in shapes],
            "norms": [_affine(shape[-1]) for shape in shapes],
        }
        if inputs != outputs:
            params |= {"shortcut": _filter(rng, 1, 1, inputs, outputs), "norm": _affine(outputs)}
        return params

    stages, channels = [], widths[0]
    for width, depth in zip(widths, depths, strict=True):
        blocks = []
        for _ in range(depth):
            blocks.append(block(channels, width))
            channels = width * _EXPANSION if bottleneck else width
        stages.append(blocks)
    return {
        "stem": _filter(rng, 7, 7, 3, widths[0]),
        "norm": _affine(widths[0]),
        "stages": stages,
        "head": _dense(rng, channels, CLASSES),
    }


def _resnet(params: Params, x: jax.Array, smooth: bool = False) -> jax.Array:
    rectify = jax.nn.softplus if smooth else jax.nn.relu
    x = rectify(_batch_norm(params["norm"], _conv(x, params["stem"], 2, 3)))
    least, join = (0.0, lax.add) if smooth else (-jnp.inf, lax.max)
    pads = [(0, 0), (1, 1), (1, 1), (0, 0)]
    x = lax.reduce_window(x, np.asarray(least, x.dtype), join, (1, 3, 3, 1), (1, 2, 2, 1), pads)
    for stage, blocks in enumerate(params["stages"]):
        for index, p in enumerate(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            strided = 1 if len(p["convs"]) == 3 else 0  # the 3x3 one of a bottleneck
            y, shortcut = x, x
            for layer, (w, norm) in enumerate(zip(p["convs"], p["norms"], strict=True)):
                y = rectify(y) if layer else y
                y = _conv(y, w, stride if layer == strided else 1, w.shape[0] // 2)
                y = _batch_norm(norm, y)
            if "shortcut" in p:
                shortcut = _batch_norm(p["norm"], _conv(x, p["shortcut"], stride, 0))
            x = rectify(y + shortcut)
    return _linear(params["head"], jnp.mean(x, (1, 2)))


def _init_convnext(
    rng: np.random.Generator, widths: Sequence[int], depths: Sequence[int]
) -> Params:
    def block(width: int) -> Params:
        return {
            "depthwise": _filter(rng, 7, 7, 1, width),
            "bias": np.zeros(width, np.float32),
            "norm": _affine(width),
            "expand": _dense(rng, width, 4 * width),
            "project": _dense(rng, 4 * width, width),
            "layer_scale": np.ones(width, np.float32),
        }

    stages, channels, patch = [], 3, 4
    for width, depth in zip(widths, depths, strict=True):
        stages.append(
            {
                # The stem normalizes its output, a later stage its input.
                "norm": _affine(width if channels == 3 else channels),
                "patches": _filter(rng, patch, patch, channels, width),
                "bias": np.zeros(width, np.float32),
                "blocks": [block(width) for _ in range(depth)],
            }
        )
        channels, patch = width, 2
    return {"stages": stages, "norm": _affine(channels), "head": _dense(rng, channels, CLASSES)}


def _convnext(params: Params, x: jax.Array) -> jax.Array:
    for index, stage in enumerate(params["stages"]):
        if index > 0:
            x = _layer_norm(stage["norm"], x)
        x = _conv(x, stage["patches"], stage["patches"].shape[0], 0) + stage["bias"]
        if index == 0:
            x = _layer_norm(stage["norm"], x)
        for p in stage["blocks"]:
            y = _conv(x, p["depthwise"], 1, 3, groups=x.shape[-1]) + p["bias"]
            y = _linear(p["expand"], _layer_norm(p["norm"], y))
            y = _linear(p["project"], jax.nn.gelu(y, approximate=False))
            x = x + p["layer_scale"] * y
    return _linear(params["head"], _layer_norm(params["norm"], jnp.mean(x, (1, 2))))


RESNET50 = Net(
    "ResNet-50",
    (64, 128, 256, 512),
    (3, 4, 6, 3),
    functools.partial(_init_resnet, bottleneck=True),
    _resnet,
    smooth_logits=functools.partial(_resnet, smooth=True),
)
NETS = {
    "resnet18": Net(
        "ResNet-18",
        (64, 128, 256, 512),
        (2, 2, 2, 2),
        _init_resnet,
        _resnet,
        smooth_logits=functools.partial(_resnet, smooth=True),
    ),
    "convnext": Net("ConvNeXt-Atto", (40, 80, 160, 320), (2, 2, 6, 2), _init_convnext, _convnext),
    "resnet50": RESNET50,
    "convnext_tiny": Net(
        "ConvNeXt-T", (96, 192, 384, 768), (3, 3, 9, 3), _init_convnext, _convnext
    ),
}
DEFAULT_NETS = ("resnet18", "convnext")
