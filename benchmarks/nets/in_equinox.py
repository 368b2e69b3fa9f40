"""Two of the nets in Equinox: of one image, channels first, under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from equinox import nn

from . import Spec, key_of


class Functions(NamedTuple):
    """What a net applies between its layers: those that users take, or smooth ones."""

    relu: Callable[[jax.Array], jax.Array]
    pool: Callable[..., nn.Pool]


USUAL = Functions(jax.nn.relu, nn.MaxPool2d)
SMOOTH = Functions(jax.nn.softplus, nn.AvgPool2d)


class ConvNorm(eqx.Module):
    """A convolution without bias, padded by half of its window, and batch norm."""

    conv: nn.Conv2d
    norm: nn.BatchNorm

    def __init__(self, inputs: int, outputs: int, window: int, stride: int = 1, *,
                 key: jax.Array) -> None:  # fmt: skip
        self.conv = nn.Conv2d(inputs, outputs, window, stride, window // 2, use_bias=False,
                              key=key)  # fmt: skip
        self.norm = nn.BatchNorm(outputs, axis_name="batch", mode="batch")

    def __call__(self, x: jax.Array, state: nn.State) -> tuple[jax.Array, nn.State]:
        return self.norm(self.conv(x), state)


class ResidualBlock(eqx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    first: ConvNorm
    second: ConvNorm
    shortcut: ConvNorm | None
    relu: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(self, inputs: int, width: int, stride: int, functions: Functions,
                 key: jax.Array) -> None:  # fmt: skip
        keys = jax.random.split(key, 3)
        self.relu = functions.relu
        self.first = ConvNorm(inputs, width, 3, stride, key=keys[0])
        self.second = ConvNorm(width, width, 3, key=keys[1])
        self.shortcut = None
        if stride > 1 or inputs != width:
            self.shortcut = ConvNorm(inputs, width, 1, stride, key=keys[2])

    def __call__(self, x: jax.Array, state: nn.State) -> tuple[jax.Array, nn.State]:
        y, state = self.first(x, state)
        y, state = self.second(self.relu(y), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return self.relu(x + y), state


class ResNet(eqx.Module):
    """ResNet of blocks of two convolutions."""

    stem: ConvNorm
    pool: nn.Pool
    blocks: list[ResidualBlock]
    head: nn.Linear
    relu: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(self, spec: Spec, functions: Functions, key: jax.Array) -> None:
        channels = spec.widths[0]
        keys = iter(jax.random.split(key, 2 + sum(spec.depths)))
        self.relu = functions.relu
        self.stem = ConvNorm(spec.channels, channels, 7, 2, key=next(keys))
        self.pool = functions.pool(3, 2, padding=1)
        self.blocks = []
        for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                block = ResidualBlock(channels, width, stride, functions, next(keys))
                self.blocks.append(block)
                channels = width
        self.head = nn.Linear(channels, spec.outputs, key=next(keys))

    def __call__(self, x: jax.Array, state: nn.State) -> tuple[jax.Array, nn.State]:
        x, state = self.stem(x, state)
        x = self.pool(self.relu(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean(range(1, x.ndim))), state


class TasNetBlock(eqx.Module):
    """A dilated depthwise convolution between two 1x1 ones."""

    expand: nn.Conv1d
    norm: nn.GroupNorm
    depthwise: nn.Conv1d
    depthwise_norm: nn.GroupNorm
    project: nn.Conv1d
    relu: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(self, width: int, inner: int, dilation: int, functions: Functions,
                 key: jax.Array) -> None:  # fmt: skip
        keys = jax.random.split(key, 3)
        self.relu = functions.relu
        self.expand = nn.Conv1d(width, inner, 1, key=keys[0])
        self.norm = nn.GroupNorm(1, inner)
        self.depthwise = nn.Conv1d(inner, inner, 3, padding=dilation, dilation=dilation,
                                   groups=inner, key=keys[1])  # fmt: skip
        self.depthwise_norm = nn.GroupNorm(1, inner)
        self.project = nn.Conv1d(inner, width, 1, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.relu(self.expand(x)))
        return x + self.project(self.depthwise_norm(self.relu(self.depthwise(y))))


class TasNet(eqx.Module):
    """A small Conv-TasNet: it masks a learnt transform of a signal."""

    encoder: nn.Conv1d
    norm: nn.GroupNorm
    narrow: nn.Conv1d
    blocks: list[TasNetBlock]
    mask: nn.Conv1d
    decoder: nn.ConvTranspose1d
    relu: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(self, spec: Spec, functions: Functions, key: jax.Array) -> None:
        features, width, inner = spec.widths
        keys = iter(jax.random.split(key, 4 + sum(spec.depths)))
        self.relu = functions.relu
        self.encoder = nn.Conv1d(spec.channels, features, 16, 8, use_bias=False, key=next(keys))
        self.norm = nn.GroupNorm(1, features)
        self.narrow = nn.Conv1d(features, width, 1, key=next(keys))
        self.blocks = [
            TasNetBlock(width, inner, 2**index, functions, next(keys))
            for depth in spec.depths
            for index in range(depth)
        ]
        self.mask = nn.Conv1d(width, features, 1, key=next(keys))
        self.decoder = nn.ConvTranspose1d(features, spec.outputs, 16, 8, use_bias=False,
                                          key=next(keys))  # fmt: skip

    def __call__(self, x: jax.Array, state: nn.State) -> tuple[jax.Array, nn.State]:
        features = self.relu(self.encoder(x))
        y = self.narrow(self.norm(features))
        for block in self.blocks:
            y = block(y)
        return self.decoder(features * jax.nn.sigmoid(self.mask(self.relu(y)))), state


NETS: dict[str, type[eqx.Module]] = {"resnet": ResNet, "tasnet": TasNet}


def build(spec: Spec, seed: int, smooth: bool) -> tuple[Any, Any, Callable[..., Any]]:
    """A net in training mode, as `in_flax.build` gives it; x is channels first."""
    functions = SMOOTH if smooth else USUAL
    net, state = nn.make_with_state(NETS[spec.net])(spec, functions, key_of(seed))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply(params: Any, state: nn.State, x: jax.Array) -> Any:
        net = eqx.combine(params, static)
        return jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    return params, state, apply
