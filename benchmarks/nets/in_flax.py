"""The nets in Flax NNX, channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from . import Spec, key_of


class Functions(NamedTuple):
    """What a net applies between its layers: those that users take, or smooth ones."""

    relu: Callable[[jax.Array], jax.Array]
    relu6: Callable[[jax.Array], jax.Array]
    pool: Callable[..., jax.Array]


USUAL = Functions(nnx.relu, nnx.relu6, nnx.max_pool)
SMOOTH = Functions(nnx.softplus, nnx.softplus, nnx.avg_pool)


class ConvNorm(nnx.Module):
    """A convolution without bias, padded by half of its window, and batch norm."""

    def __init__(self, inputs: int, outputs: int, window: Sequence[int], *, rngs: nnx.Rngs,
                 strides: int = 1, groups: int = 1) -> None:  # fmt: skip
        padding = [(size // 2, size // 2) for size in window]
        self.conv = nnx.Conv(
            inputs,
            outputs,
            window,
            strides=strides,
            padding=padding,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, or the three of a bottleneck, beside a shortcut."""

    def __init__(self, inputs: int, width: int, axes: int, strides: int, bottleneck: bool,
                 functions: Functions, rngs: nnx.Rngs) -> None:  # fmt: skip
        self.relu = functions.relu
        one, three = (1,) * axes, (3,) * axes
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [
                ConvNorm(inputs, width, one, rngs=rngs),
                ConvNorm(width, width, three, strides=strides, rngs=rngs),
                ConvNorm(width, outputs, one, rngs=rngs),
            ]
        else:
            layers = [
                ConvNorm(inputs, width, three, strides=strides, rngs=rngs),
                ConvNorm(width, width, three, rngs=rngs),
            ]
        self.layers = nnx.List(layers)
        changes = strides > 1 or inputs != outputs
        self.shortcut = (
            ConvNorm(inputs, outputs, one, strides=strides, rngs=rngs) if changes else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = layer(self.relu(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """ResNet over two or three axes."""

    def __init__(self, spec: Spec, functions: Functions, rngs: nnx.Rngs) -> None:
        self.functions = functions
        self.axes = len(spec.sizes)
        channels = spec.widths[0]
        self.stem = ConvNorm(spec.channels, channels, (7,) * self.axes, strides=2, rngs=rngs)
        blocks = []
        for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
            for index in range(depth):
                strides = 2 if stage and not index else 1
                blocks.append(ResidualBlock(channels, width, self.axes, strides, spec.bottleneck,
                                            functions, rngs))  # fmt: skip
                channels = 4 * width if spec.bottleneck else width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, spec.outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.functions.relu(self.stem(x))
        window, strides = (3,) * self.axes, (2,) * self.axes
        x = self.functions.pool(x, window, strides, padding=[(1, 1)] * self.axes)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(range(1, 1 + self.axes)))


class InvertedResidual(nnx.Module):
    """The block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, strides: int, expansion: int,
                 functions: Functions, rngs: nnx.Rngs) -> None:  # fmt: skip
        self.relu6 = functions.relu6
        width = expansion * inputs
        self.expand = ConvNorm(inputs, width, (1, 1), rngs=rngs) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, (3, 3), strides=strides, groups=width, rngs=rngs)
        self.project = ConvNorm(width, outputs, (1, 1), rngs=rngs)
        self.residual = strides == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else self.relu6(self.expand(x))
        y = self.project(self.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class MobileNet(nnx.Module):
    """MobileNetV2."""

    STRIDES = (1, 2, 2, 2, 1, 2, 1)

    def __init__(self, spec: Spec, functions: Functions, rngs: nnx.Rngs) -> None:
        self.relu6 = functions.relu6
        channels, *widths, last = spec.widths
        self.stem = ConvNorm(spec.channels, channels, (3, 3), strides=2, rngs=rngs)
        blocks = []
        for stage, (width, depth) in enumerate(zip(widths, spec.depths, strict=True)):
            for index in range(depth):
                strides = 1 if index else self.STRIDES[stage]
                blocks.append(InvertedResidual(channels, width, strides, 6 if stage else 1,
                                               functions, rngs))  # fmt: skip
                channels = width
        self.blocks = nnx.List(blocks)
        self.last = ConvNorm(channels, last, (1, 1), rngs=rngs)
        self.head = nnx.Linear(last, spec.outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.relu6(self.last(x)).mean((1, 2)))


class ConvNeXtBlock(nnx.Module):
    """A 7x7 depthwise convolution, and two products over the channels."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.depthwise = nnx.Conv(width, width, (7, 7), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.project = nnx.Linear(4 * width, width, rngs=rngs)
        # Not the 1e-6 of the paper, at which float32 would hide an error in a gradient.
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.expand(self.norm(self.depthwise(x)))
        return x + self.scale * self.project(nnx.gelu(y, approximate=False))


class ConvNeXt(nnx.Module):
    """ConvNeXt."""

    def __init__(self, spec: Spec, functions: Functions, rngs: nnx.Rngs) -> None:
        layers: list[Any] = []
        channels = spec.channels
        for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
            patch = 2 if stage else 4
            # The stem normalizes its output, a later stage its input.
            norm = nnx.LayerNorm(channels if stage else width, rngs=rngs)
            patches = nnx.Conv(channels, width, (patch, patch), strides=patch, padding="VALID",
                               rngs=rngs)  # fmt: skip
            layers += [norm, patches] if stage else [patches, norm]
            layers += [ConvNeXtBlock(width, rngs) for _ in range(depth)]
            channels = width
        self.layers = nnx.List(layers)
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.head = nnx.Linear(channels, spec.outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean((1, 2))))


class DoubleConv(nnx.Module):
    """Two 3x3 convolutions of U-Net."""

    def __init__(self, inputs: int, outputs: int, functions: Functions, rngs: nnx.Rngs) -> None:
        self.relu = functions.relu
        self.first = ConvNorm(inputs, outputs, (3, 3), rngs=rngs)
        self.second = ConvNorm(outputs, outputs, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.relu(self.second(self.relu(self.first(x))))


class UNet(nnx.Module):
    """U-Net with batch norm and padded convolutions."""

    def __init__(self, spec: Spec, functions: Functions, rngs: nnx.Rngs) -> None:
        self.pool = functions.pool
        inputs = (spec.channels, *spec.widths)
        self.down = nnx.List(
            [DoubleConv(a, b, functions, rngs) for a, b in zip(inputs, spec.widths, strict=False)]
        )
        pairs = list(zip(spec.widths[:0:-1], spec.widths[-2::-1], strict=True))
        self.up = nnx.List(
            [
                nnx.ConvTranspose(a, b, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
                for a, b in pairs
            ]
        )
        self.join = nnx.List([DoubleConv(2 * b, b, functions, rngs) for _, b in pairs])
        self.head = nnx.Conv(spec.widths[0], spec.outputs, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for index, layer in enumerate(self.down):
            x = layer(self.pool(x, (2, 2), strides=(2, 2)) if index else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(jnp.concatenate([skip, up(x)], axis=-1))
        return self.head(x)


class TasNetBlock(nnx.Module):
    """A dilated depthwise convolution between two 1x1 ones."""

    def __init__(self, width: int, inner: int, dilation: int, functions: Functions,
                 rngs: nnx.Rngs) -> None:  # fmt: skip
        self.relu = functions.relu
        self.expand = nnx.Conv(width, inner, (1,), rngs=rngs)
        self.norm = nnx.GroupNorm(inner, num_groups=1, epsilon=1e-5, rngs=rngs)
        self.depthwise = nnx.Conv(inner, inner, (3,), kernel_dilation=dilation,
                                  feature_group_count=inner, rngs=rngs)  # fmt: skip
        self.depthwise_norm = nnx.GroupNorm(inner, num_groups=1, epsilon=1e-5, rngs=rngs)
        self.project = nnx.Conv(inner, width, (1,), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.relu(self.expand(x)))
        y = self.depthwise_norm(self.relu(self.depthwise(y)))
        return x + self.project(y)


class TasNet(nnx.Module):
    """A small Conv-TasNet: it masks a learnt transform of a signal."""

    def __init__(self, spec: Spec, functions: Functions, rngs: nnx.Rngs) -> None:
        self.relu = functions.relu
        features, width, inner = spec.widths
        self.encoder = nnx.Conv(spec.channels, features, (16,), strides=8, padding="VALID",
                                use_bias=False, rngs=rngs)  # fmt: skip
        self.norm = nnx.GroupNorm(features, num_groups=1, epsilon=1e-5, rngs=rngs)
        self.narrow = nnx.Conv(features, width, (1,), rngs=rngs)
        self.blocks = nnx.List(
            [
                TasNetBlock(width, inner, 2**index, functions, rngs)
                for depth in spec.depths
                for index in range(depth)
            ]
        )
        self.mask = nnx.Conv(width, features, (1,), rngs=rngs)
        self.decoder = nnx.ConvTranspose(features, spec.outputs, (16,), strides=(8,),
                                         padding="VALID", use_bias=False, rngs=rngs)  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.relu(self.encoder(x))
        y = self.narrow(self.norm(features))
        for block in self.blocks:
            y = block(y)
        return self.decoder(features * nnx.sigmoid(self.mask(self.relu(y))))


NETS: dict[str, type[nnx.Module]] = {
    "resnet": ResNet,
    "mobilenet": MobileNet,
    "convnext": ConvNeXt,
    "unet": UNet,
    "tasnet": TasNet,
}


def build(spec: Spec, seed: int, smooth: bool) -> tuple[Any, Any, Callable[..., Any]]:
    """A net in training mode.

    Returns:
        (params, others, apply): what is trained, what a step changes besides, and a function
        of (params, others, x) to (outputs, others).
    """
    net = NETS[spec.net](spec, SMOOTH if smooth else USUAL, rngs=nnx.Rngs(key_of(seed)))
    graph, params, others = nnx.split(net, nnx.Param, ...)

    def apply(params: Any, others: Any, x: jax.Array) -> Any:
        net = nnx.merge(graph, params, others, copy=True)
        outputs = net(x)
        return outputs, nnx.split(net, nnx.Param, ...)[2]

    return params, others, apply
