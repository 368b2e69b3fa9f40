"""Two processes of four CPU devices each train one convolutional net, like two machines.

JAX's own runtime does the work: `jax.distributed` introduces the processes to each other
over the loopback interface, and the program is written for a mesh of all eight devices.
The batch is cut over one axis of the mesh, the rows of the images over the other. That one
crosses the processes, so every gradient of a convolution exchanges its halo rows between
them. Then a third process trains the same net on one device, and the losses have to agree.

    python examples/train_two_processes.py

Prints both curves. Exits with 1 if they differ by more than 1e-5, relatively, in any of the
first 20 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_convgrad

STEPS = 20
PROCESSES = 2
DEVICES_EACH = 4
BATCH = 32
SIDE = 16  # rows and columns of an image
CLASSES = 4
LEARNING_RATE = 1.0
RTOL = 1e-5
TIMEOUT_S = 300
KERNEL = "convgrad_input_grad"

Params = dict[str, jax.Array]


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Noise with a stripe whose direction and width is the class."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, BATCH)
    row, column = np.mgrid[:SIDE, :SIDE]
    wave = np.stack([np.sin(x * (0.5 + 0.5 * k)) for k in range(2) for x in (row, column)])
    images = wave[labels, :, :, None] + 0.5 * rng.standard_normal((BATCH, SIDE, SIDE, 3))
    return images.astype(np.float32), labels


def initial_params() -> dict[str, np.ndarray]:
    """Filters in HWIO, scaled by their number of inputs."""
    rng = np.random.default_rng(6)
    shapes = {
        "stem": (3, 3, 3, 16),
        "strided": (3, 3, 16, 32),
        "grouped": (3, 3, 8, 32),
        "head": (32, CLASSES),
    }
    return {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def loss_of(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of three convolutions and a linear head."""

    def conv(x: jax.Array, name: str, stride: int = 1, groups: int = 1) -> jax.Array:
        y = jax_convgrad.conv_general_dilated(
            x,
            params[name],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.tanh(y)

    x = conv(images, "stem")
    x = conv(x, "strided", stride=2)
    x = conv(x, "grouped", groups=4)
    logits = x.mean((1, 2)) @ params["head"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def train(mesh: Mesh) -> dict[str, Any]:
    """The losses of the first steps, on a mesh with the axes "rows" and "data", and what ran."""

    def put(value: np.ndarray, *spec: str | None) -> jax.Array:
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    images, labels = images_and_labels()
    # Each process hands over the parts that its own devices hold.
    x, y = put(images, "data", "rows"), put(labels, "data")
    params = {name: put(value) for name, value in initial_params().items()}

    @jax.jit
    def step(params: Params, x: jax.Array, y: jax.Array) -> tuple[Params, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients), loss

    compiled = step.lower(params, x, y).compile()
    losses = []
    for _ in range(STEPS):
        params, loss = compiled(params, x, y)
        losses.append(float(loss))
    text = compiled.as_text()
    return {
        "devices": mesh.size,
        "kernels": text.count(f'custom_call_target="{KERNEL}"'),
        "halos": text.count(" collective-permute("),
        "losses": losses,
    }


def work(process: int, coordinator: str | None, result: pathlib.Path) -> None:
    """What a process of this example does: trains, and leaves its losses in a file."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if coordinator is not None:
        jax.distributed.initialize(coordinator, PROCESSES, process, initialization_timeout=60)
        shape = (PROCESSES, DEVICES_EACH)
    else:
        shape = (1, 1)
    mesh = jax.make_mesh(shape, ("rows", "data"), axis_types=(AxisType.Auto,) * 2)
    result.write_text(json.dumps(train(mesh)))


def exit_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that went."""
    os.read(sys.stdin.fileno(), 1)  # blocks until the pipe is closed
    os._exit(1)


def start(process: int, coordinator: str | None, result: pathlib.Path) -> subprocess.Popen[Any]:
    """Starts this file as a worker with its own CPU devices."""
    devices = 1 if coordinator is None else DEVICES_EACH
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--process", str(process), "--result", str(result)]
    if coordinator is not None:
        command += ["--coordinator", coordinator]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)


def run(coordinator: str | None, folder: pathlib.Path) -> dict[str, Any]:
    """Runs two processes that know a coordinator, or one that knows none; the first's result."""
    count = 1 if coordinator is None else PROCESSES
    results = [folder / f"{count}-{process}.json" for process in range(count)]
    workers = [start(process, coordinator, result) for process, result in enumerate(results)]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while (codes := [worker.poll() for worker in workers]).count(0) < count:
            # Whichever it was: those that live on would wait for the one that died.
            if any(codes):
                raise SystemExit(f"the processes ended with exit codes {codes}")
            if time.monotonic() > deadline:
                raise SystemExit(f"the processes took more than {TIMEOUT_S} s")
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    first, *others = (json.loads(result.read_text()) for result in results)
    assert all(other == first for other in others), "the processes disagree"
    return first


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    """Trains twice and compares."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        together = run(f"127.0.0.1:{free_port()}", folder)
        alone = run(None, folder)
    assert (together["devices"], alone["devices"]) == (PROCESSES * DEVICES_EACH, 1)
    print(
        f"Each device runs {together['kernels']} custom calls to {KERNEL} and "
        f"{together['halos']} exchanges of rows a step."
    )
    print(f"step  {PROCESSES} processes, {together['devices']} devices  1 process, 1 device")
    worst = 0.0
    for step, (a, b) in enumerate(zip(together["losses"], alone["losses"], strict=True)):
        worst = max(worst, abs(a - b) / abs(b))
        print(f"{step:4}  {a:.8f}                {b:.8f}")
    print(f"largest relative difference {worst:.2g}, allowed are {RTOL:.0e}")
    if not worst <= RTOL:
        raise SystemExit("the curves differ")
    if not alone["losses"][-1] < alone["losses"][0]:
        raise SystemExit("the net learned nothing")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result is None:
        main()
    else:
        work(arguments.process, arguments.coordinator, arguments.result)
