"""Brings the emulator's test programs to a GPU, where sanitizers watch them without JAX.

    python tests/emulator/on_gpu.py FOLDER [--architecture 90a] [--objects BUILD]

Builds FOLDER/core, FOLDER/primitives, FOLDER/hopper_primitives and FOLDER/gpu_layers for the
GPU that is here, or ahead for an architecture, where there may be no GPU. Kernels that the
package's build compiled are taken from its folder, except kernels whose waits the tests bound.

For each kernel it writes FOLDER/full.KERNEL, small problems in every dtype, and
FOLDER/short.KERNEL, some that the kernel takes, small enough for a sanitizer that follows
every access; and FOLDER/layers, the problems that gpu_layers times.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from emulator import build, cases
from jax_convgrad.tools import layers
from jax_convgrad.tools.geometries import Case

FEW = 12

# Layers of benchmarks/layers.json by class, net, channels and height of x: where the time of
# nets goes, one for each kernel and for each way it can be bound. The first ones matter most.
TIMED = (
    ("dense_s1", "vgg16", 256, 56),
    ("dense_strided", "resnet50_v1.5", 128, 56),
    ("pointwise_s1", "resnet50_v1.5", 256, 56),
    ("depthwise_s1", "mobilenet_v2_dw", 144, 56),
    ("grouped", "resnext50_32x4d_g32", 128, 56),
    ("small_c", "resnet50_v1.5", 3, 224),
    ("pointwise_s2", "resnet50_v1.5", 256, 56),
    ("depthwise_s2", "mobilenet_v2_dw", 144, 56),
    ("odd_channels", "odd", 67, 28),
    ("dilated", "deeplabv3_backbone", 512, 33),
    ("small_c", "vit_b16_patch", 3, 224),
)
# float32 with TF32, and with the accuracy of float32.
TIMED_F32 = TIMED[:5]
TIMED_EXACT = TIMED[:1]


def taken(core: pathlib.Path, folder: pathlib.Path, lines: list[str]) -> set[str]:
    """Those of the lines whose kernel takes the problem."""
    path = cases.write(folder / "candidates", lines)
    done = subprocess.run([core, "--taken", path], stdout=subprocess.PIPE, text=True, check=True)
    path.unlink()
    return set(done.stdout.splitlines())


def spread(lines: list[str]) -> list[str]:
    """Some of the lines, from the first to nearly the last."""
    return lines[:: max(1, len(lines) // FEW)][:FEW]


def full_problems(kernel: str) -> list[str]:
    """Lines for core.cc. The kernel skips problems that it does not take."""
    small = list(cases.small_cases(10, 0, 1 << 18))
    if kernel == "wgmma":
        hopper = cases.hopper_sweep(40, 0)
        walking = [
            cases.line(case, "bfloat16", kernel=kernel) for case in cases.hopper_walking_cases()
        ]
        return [*walking, *cases.hopper_lines(hopper), *cases.tile_lines(kernel, hopper)]
    return [
        cases.line(case, dtype, kernel=kernel, special=special, allow_tf32=allow_tf32)
        for index, case in enumerate(small)
        for dtype in cases.DTYPES
        for allow_tf32 in ((True, False) if dtype == "float32" else (True,))
        for special in ((False, True) if index % 3 == 0 else (False,))
    ] + list(cases.tile_lines(kernel, small))


def short_problems(kernel: str, core: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Lines for core.cc, spread over what the kernel takes."""
    if kernel == "wgmma":
        tma, copied = cases.hopper_cases(), cases.copied_cases()
        return [
            *spread(list(cases.hopper_lines(tma))),
            *spread(list(cases.hopper_lines(copied))),
        ]
    small = list(cases.small_cases(0, 0, 1 << 16))

    def lines(case: Case, special: bool = False) -> list[str]:
        return [cases.line(case, d, kernel=kernel, special=special) for d in cases.DTYPES]

    known = taken(core, folder, [line for case in small for line in lines(case)])
    found: list[str] = []
    for index, case in enumerate(small):
        turn = index % len(cases.DTYPES)
        special = lines(case, special=len(found) % 3 == 2)
        in_turn = [*zip(lines(case), special, strict=True)]
        found += [line for plain, line in (*in_turn[turn:], *in_turn[:turn]) if plain in known][:1]
    return [*spread(found), *spread(list(cases.tile_lines(kernel, small)))]


def timed_layers() -> list[str]:
    """Lines for benchmarks/gpu_layers.cu: each layer's kernels, and then its other tiles."""
    by_key = {}
    for layer in layers.load(cases.LAYERS, "NHWC"):
        g = layer.geometry
        channels, height = (g.lhs_shape[d] for d in g.dimension_numbers.lhs_spec[1:3])
        by_key.setdefault((layer.class_name, layer.name, channels, height), layer)
    lines = []
    for keys, dtype, allow_tf32 in (
        (TIMED, "bfloat16", True),
        (TIMED_F32, "float32", True),
        (TIMED_EXACT, "float32", False),
    ):
        for key in keys:
            class_name, net = key[0], key[1]
            case = Case(f"{net}_{class_name}".replace(" ", "_"), by_key[key].geometry)
            lines.append(cases.line(case, dtype, allow_tf32=allow_tf32))
            lines += [
                cases.line(case, dtype, kernel=kernel, tile=tile, allow_tf32=allow_tf32)
                for kernel, tiles in cases.TILES.items()
                for tile in tiles
            ]
    return lines


def main() -> None:
    """Does what the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--architecture", help="such as 90a; by default that of the GPU here")
    parser.add_argument("--objects", type=pathlib.Path, help="the package's build folder")
    arguments = parser.parse_args()
    folder, architecture = arguments.folder, arguments.architecture
    flags: tuple[str, ...] = ()
    if architecture is None:
        import jax

        architecture = build.gpu_architecture(jax.devices("cuda")[0].compute_capability)
    else:
        flags = ("-Xcompiler=-static-libstdc++",)  # it may run where that library is older
    objects = {}
    if arguments.objects is not None:
        found = arguments.objects.rglob("*.cu.o")
        objects = {path.name.removesuffix(".o"): path for path in sorted(found)}
    bounded = {name: path for name, path in objects.items() if name != "wgmma.cu"}
    for name, sources, made in (
        ("core", build.core_sources(), bounded),
        ("primitives", [build.EMULATOR / "primitives.cu"], {}),
        ("hopper_primitives", [build.EMULATOR / "hopper_primitives.cu"], {}),
        ("gpu_layers", build.layers_sources(), objects),
    ):
        program = build.gpu_program(sources, architecture, made, flags)
        shutil.copy(program, folder / name)
    core = folder / "core"
    names = subprocess.run([core, "--kernels"], stdout=subprocess.PIPE, text=True, check=True)
    for kernel in names.stdout.split():
        cases.write(folder / f"full.{kernel}", full_problems(kernel))
        cases.write(folder / f"short.{kernel}", short_problems(kernel, core, folder))
        print(kernel)
    cases.write(folder / "layers", timed_layers())


if __name__ == "__main__":
    main()
