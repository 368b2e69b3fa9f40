"""The nets whose training steps `benchmarks/step.py` times, the same in each framework.

Written as users of each framework write them, in files of their own, which import nothing
else than that framework. A framework's file has `build(name, spec, ...)`; what is common to
all, the sizes, is here.
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes of a net and of its data.

    Attributes:
        title: its name in print.
        net: what to build: "resnet", "mobilenet", "convnext", "unet" or "tasnet".
        widths: channels: of each stage; of tasnet those of encoder, bottleneck and block.
        depths: blocks of each stage; of tasnet the blocks of each repetition.
        sizes: of an image, without batch and channels.
        batch: images.
        channels: of an image.
        outputs: classes, or channels of a signal.
        target: "class" for each image, a "class map" for each position, or a "signal".
        bottleneck: whether a resnet has blocks of three convolutions.
    """

    title: str
    net: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    sizes: tuple[int, ...] = (112, 112)
    batch: int = 8
    channels: int = 3
    outputs: int = 1000
    target: str = "class"
    bottleneck: bool = False

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of the targets, channels last."""
        signal = (self.outputs,) if self.target == "signal" else ()
        return (self.batch, *(() if self.target == "class" else self.sizes), *signal)


def key_of(seed: int) -> jax.Array:
    """The key of a net's random parameters, by a generator that XLA compiles in little time."""
    return jax.random.key(seed, impl="unsafe_rbg")


_RESNET_WIDTHS = (64, 128, 256, 512)
SPECS = {
    "resnet18": Spec("ResNet-18", "resnet", _RESNET_WIDTHS, (2, 2, 2, 2)),
    "resnet50": Spec("ResNet-50", "resnet", _RESNET_WIDTHS, (3, 4, 6, 3), bottleneck=True),
    # Stem, seven stages, and the layer before the classes.
    "mobilenet": Spec("MobileNetV2", "mobilenet", (32, 16, 24, 32, 64, 96, 160, 320, 1280),
                      (1, 2, 3, 4, 3, 3, 1)),
    "convnext": Spec("ConvNeXt-Atto", "convnext", (40, 80, 160, 320), (2, 2, 6, 2)),
    "unet": Spec("U-Net", "unet", (32, 64, 128, 256, 512), (), (128, 128), 2, outputs=21,
                 target="class map"),
    "tasnet": Spec("Conv-TasNet", "tasnet", (256, 128, 256), (8, 8), (8000,), 2, 1, 1, "signal"),
    "resnet3d": Spec("3-D ResNet-10", "resnet", (32, 64, 128, 256), (1, 1, 1, 1), (32, 64, 64),
                     4, outputs=400),
}  # fmt: skip


# The same nets as small as they can be, for tests.
TINY = {
    name: dataclasses.replace(spec, widths=widths, depths=depths, sizes=sizes, batch=2, outputs=5)
    for (name, spec), (widths, depths, sizes) in zip(
        SPECS.items(),
        [
            ((4, 8), (1, 1), (32, 32)),
            ((4, 8), (1, 1), (32, 32)),
            ((4, 4, 8, 16), (1, 1), (16, 16)),
            ((4, 8), (1, 1), (16, 16)),
            ((4, 8), (), (16, 16)),
            ((8, 4, 8), (2,), (72,)),
            ((4, 8), (1, 1), (16, 32, 32)),
        ],
        strict=True,
    )
}
