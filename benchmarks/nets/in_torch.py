"""The nets in PyTorch."""

from __future__ import annotations

import torch
from torch import nn

from . import Spec

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def conv_norm(inputs: int, outputs: int, window: int, stride: int = 1, groups: int = 1,
              axes: int = 2) -> nn.Sequential:  # fmt: skip
    """A convolution without bias, padded by half of its window, and batch norm."""
    return nn.Sequential(
        _CONVS[axes](inputs, outputs, window, stride, window // 2, groups=groups, bias=False),
        _NORMS[axes](outputs),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or the three of a bottleneck, beside a shortcut."""

    def __init__(self, inputs: int, width: int, axes: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.layers = nn.Sequential(
                conv_norm(inputs, width, 1, axes=axes),
                nn.ReLU(inplace=True),
                conv_norm(width, width, 3, stride, axes=axes),
                nn.ReLU(inplace=True),
                conv_norm(width, outputs, 1, axes=axes),
            )
        else:
            self.layers = nn.Sequential(
                conv_norm(inputs, width, 3, stride, axes=axes),
                nn.ReLU(inplace=True),
                conv_norm(width, width, 3, axes=axes),
            )
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = conv_norm(inputs, outputs, 1, stride, axes=axes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet(spec: Spec) -> nn.Module:
    """ResNet over two or three axes."""
    axes, channels = len(spec.sizes), spec.widths[0]
    layers: list[nn.Module] = [
        conv_norm(spec.channels, channels, 7, 2, axes=axes),
        nn.ReLU(inplace=True),
        _POOLS[axes](3, 2, 1),
    ]
    for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            layers.append(ResidualBlock(channels, width, axes, stride, spec.bottleneck))
            channels = 4 * width if spec.bottleneck else width
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, spec.outputs))


class Mean(nn.Module):
    """The mean over all positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, ...] to [N, C]."""
        return x.mean(dim=tuple(range(2, x.dim())))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * inputs
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [conv_norm(inputs, width, 1), nn.ReLU6(inplace=True)]
        layers += [conv_norm(width, width, 3, stride, width), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, conv_norm(width, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet(spec: Spec) -> nn.Module:
    """MobileNetV2."""
    channels, *widths, last = spec.widths
    layers: list[nn.Module] = [conv_norm(spec.channels, channels, 3, 2), nn.ReLU6(inplace=True)]
    strides = (1, 2, 2, 2, 1, 2, 1)
    for stage, (width, depth) in enumerate(zip(widths, spec.depths, strict=True)):
        for index in range(depth):
            stride = 1 if index else strides[stage]
            layers.append(InvertedResidual(channels, width, stride, 6 if stage else 1))
            channels = width
    layers += [conv_norm(channels, last, 1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, Mean(), nn.Linear(last, spec.outputs))


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A 7x7 depthwise convolution, and two products over the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width, 1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        y = self.scale * self.layers(self.depthwise(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


def convnext(spec: Spec) -> nn.Module:
    """ConvNeXt."""
    layers: list[nn.Module] = []
    channels = spec.channels
    for stage, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
        patch = 2 if stage else 4
        # The stem normalizes its output, a later stage its input.
        norm = LayerNorm(channels if stage else width, 1e-6)
        patches = nn.Conv2d(channels, width, patch, patch)
        layers += [norm, patches] if stage else [patches, norm]
        layers += [ConvNeXtBlock(width) for _ in range(depth)]
        channels = width
    return nn.Sequential(*layers, Mean(), nn.LayerNorm(channels, 1e-6),
                         nn.Linear(channels, spec.outputs))  # fmt: skip


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions of U-Net."""
    return nn.Sequential(
        conv_norm(inputs, outputs, 3),
        nn.ReLU(inplace=True),
        conv_norm(outputs, outputs, 3),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """U-Net with batch norm and padded convolutions."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        inputs = (spec.channels, *spec.widths)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(
            [double_conv(a, b) for a, b in zip(inputs, spec.widths, strict=False)]
        )
        pairs = list(zip(spec.widths[:0:-1], spec.widths[-2::-1], strict=True))
        self.up = nn.ModuleList([nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs])
        self.join = nn.ModuleList([double_conv(2 * b, b) for _, b in pairs])
        self.head = nn.Conv2d(spec.widths[0], spec.outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to the classes of each position."""
        skips = []
        for index, layer in enumerate(self.down):
            x = layer(self.pool(x) if index else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class TasNetBlock(nn.Module):
    """A dilated depthwise convolution between two 1x1 ones."""

    def __init__(self, width: int, inner: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(width, inner, 1),
            nn.ReLU(inplace=True),
            nn.GroupNorm(1, inner),
            nn.Conv1d(inner, inner, 3, padding=dilation, dilation=dilation, groups=inner),
            nn.ReLU(inplace=True),
            nn.GroupNorm(1, inner),
            nn.Conv1d(inner, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        return x + self.layers(x)


class TasNet(nn.Module):
    """A small Conv-TasNet: it masks a learnt transform of a signal."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        features, width, inner = spec.widths
        self.encoder = nn.Sequential(
            nn.Conv1d(spec.channels, features, 16, 8, bias=False), nn.ReLU(inplace=True)
        )
        self.mask = nn.Sequential(
            nn.GroupNorm(1, features),
            nn.Conv1d(features, width, 1),
            *(TasNetBlock(width, inner, 2**i) for depth in spec.depths for i in range(depth)),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, features, 1),
            nn.Sigmoid(),
        )
        self.decoder = nn.ConvTranspose1d(features, spec.outputs, 16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, L] to a signal of that length."""
        features = self.encoder(x)
        return self.decoder(features * self.mask(features))


NETS = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "convnext": convnext,
    "unet": UNet,
    "tasnet": TasNet,
}


def build(spec: Spec) -> nn.Module:
    """A net in training mode."""
    return NETS[spec.net](spec)
