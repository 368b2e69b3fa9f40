"""PyTorch as a peer of bench: oneDNN on a CPU, cuDNN in benchmark mode on a GPU.

A gradient is `aten.convolution_backward` with that operand's mask alone. With layout
NHWC the tensors have memory format channels_last, except in one dimension, where PyTorch
has none. Asymmetric padding is what a PyTorch user writes: `pad` in front, whose backward
crops. A layer with input dilation is PyTorch's transposed convolution, its filter
permuted and flipped beforehand.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..geometry import dilated_size
from ..maps import Role
from . import machine, require
from .workloads import Operands, Workload


class UnsupportedError(Exception):
    """PyTorch has no single call for this geometry."""


def load(precision: str) -> Any:
    """Imports torch and sets it up: every core, cuDNN's own search, TF32 as JAX has it.

    Raises:
        ToolError: torch is missing, or sees no GPU while JAX does.
    """
    # OpenMP's threads spin while they wait. On a machine that others use too, a spinning
    # thread holds the core that its sibling needs: oneDNN was seen to take 12 times as long
    # as with sleeping threads. They would also spin into the next peer's turn.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch = require("torch", "--peers torch", "pip install torch")
    torch.set_num_threads(machine.usable_cores())
    if machine.is_gpu():
        if not torch.cuda.is_available():
            raise UnsupportedError("this torch sees no GPU, but JAX runs on one")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    return torch


def settings(torch: Any) -> dict[str, Any]:
    """What PyTorch runs with, as JSON."""
    return {
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cudnn": torch.backends.cudnn.version() if machine.is_gpu() else None,
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
    }


class TorchPeer:
    """PyTorch's convolution over the pool.

    On a GPU the calls are captured into one CUDA graph over the whole pool and timed
    with events, so that Python's launches cost nothing.
    """

    name = "torch"

    def __init__(self, torch: Any, workload: Workload, pool: Sequence[Operands]) -> None:
        self._torch = torch
        self._workload = workload
        self._device = "cuda" if machine.is_gpu() else "cpu"
        lhs_spec, rhs_spec, out_spec = workload.geometry.dimension_numbers
        specs = {Role.LHS: lhs_spec, Role.RHS: rhs_spec, Role.OUT: out_spec}
        self._result_spec = specs[workload.map_.result]
        self._call = self._function()
        self._pool = [
            tuple(
                self._filter(array, rhs_spec)
                if role is Role.RHS
                else self._tensor(array, specs[role])
                for role, array in zip(workload.map_.operands, arrays, strict=True)
            )
            for arrays in pool
        ]
        self._graph: Any = None

    def _tensor(self, array: np.ndarray, spec: Sequence[int]) -> Any:
        """A tensor with PyTorch's order of dimensions, laid out in memory as the array is."""
        torch = self._torch
        if array.dtype == jnp.bfloat16:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return self._formatted(tensor.permute(*spec)).to(self._device)

    def _formatted(self, tensor: Any) -> Any:
        torch = self._torch
        last = self._workload.geometry.dimension_numbers.lhs_spec[1] != 1
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
        chosen = formats.get(tensor.dim(), torch.contiguous_format)
        return tensor.contiguous(memory_format=chosen)

    def _filter(self, w: np.ndarray, spec: Sequence[int]) -> Any:
        tensor = self._tensor(w, spec)
        if self._transposed:
            tensor = tensor.transpose(0, 1).flip(list(range(2, tensor.dim())))
        return self._formatted(tensor)

    @property
    def _transposed(self) -> bool:
        return max(self._workload.geometry.lhs_dilation) > 1

    def _function(self) -> Callable[[Any, Any], Any]:
        g, torch = self._workload.geometry, self._torch
        if g.batch_group_count > 1:
            raise UnsupportedError("PyTorch has no batch groups")
        lhs_spec = g.dimension_numbers.lhs_spec
        sizes = [g.lhs_shape[d] for d in lhs_spec]
        lows = [low for low, _ in g.padding]
        highs = [high for _, high in g.padding]
        output_padding = [0] * g.axes
        stride, crop = list(g.window_strides), None
        if self._transposed:
            if max(g.window_strides) > 1 or g.groups > 1:
                raise UnsupportedError(
                    "PyTorch's transposed convolution has no such stride or groups"
                )
            stride = list(g.lhs_dilation)
            extents = map(dilated_size, g.window_sizes, g.rhs_dilation)
            padding = [extent - 1 - low for extent, low in zip(extents, lows, strict=True)]
            output_padding = [high - low for low, high in zip(lows, highs, strict=True)]
            if min(padding) < 0 or min(output_padding) < 0:
                raise UnsupportedError(
                    f"PyTorch's transposed convolution has no padding {g.padding}"
                )
        else:
            padding = [min(pair) for pair in g.padding]
            if min(padding) < 0:
                raise UnsupportedError("PyTorch has no negative padding")
            if lows != highs:
                padding = [0] * g.axes
                sizes[2:] = [n + a + b for n, a, b in zip(sizes[2:], lows, highs, strict=True)]
                # torch's pad takes (low, high) pairs from the last axis to the first.
                crop = [-p for pair in reversed(g.padding) for p in pair]
        arguments = (stride, padding, list(g.rhs_dilation), self._transposed, output_padding)
        if self._workload.direction == "fwd":
            forward = functools.partial(
                torch.ops.aten.convolution, bias=None, groups=g.feature_group_count
            )
            names = ("stride", "padding", "dilation", "transposed", "output_padding")
            forward = functools.partial(forward, **dict(zip(names, arguments, strict=True)))
            if crop is None:
                return forward
            pads = [-p for p in crop]
            return lambda x, w: forward(torch.nn.functional.pad(x, pads), w)
        dtype = getattr(torch, self._workload.dtype)
        if self._workload.direction == "dw":
            return self._filter_grad(arguments, crop)
        x = self._formatted(torch.empty(sizes, dtype=dtype, device=self._device))

        def gradient(dy: Any, w: Any) -> Any:
            dx = torch.ops.aten.convolution_backward(
                dy, x, w, None, *arguments, g.feature_group_count, [True, False, False]
            )[0]
            return dx if crop is None else torch.nn.functional.pad(dx, crop)

        return gradient

    def _filter_grad(self, arguments: Any, crop: list[int] | None) -> Callable[[Any, Any], Any]:
        g, torch = self._workload.geometry, self._torch
        dtype = getattr(torch, self._workload.dtype)
        w = self._filter(np.zeros(g.rhs_shape, np.float32), g.dimension_numbers.rhs_spec).to(dtype)

        def gradient(x: Any, dy: Any) -> Any:
            if crop is not None:
                x = torch.nn.functional.pad(x, [-p for p in crop])
            dw = torch.ops.aten.convolution_backward(
                dy, x, w, None, *arguments, g.feature_group_count, [False, True, False]
            )[1]
            return dw.flip(list(range(2, dw.dim()))).transpose(0, 1) if self._transposed else dw

        return gradient

    def result(self) -> np.ndarray:
        """The result for the pool's first operands, in the layout of the workload."""
        torch = self._torch
        with torch.no_grad():
            out = self._call(*self._pool[0]).permute(*np.argsort(self._result_spec).tolist())
        out = out.cpu().contiguous()
        if out.dtype == torch.bfloat16:
            return np.asarray(out.view(torch.int16).numpy().view(jnp.bfloat16))
        return np.asarray(out.numpy())

    def run(self, first: int, instances: int, calls: int) -> float:
        """As `timing.Peer.run` says; on a GPU always over the whole pool."""
        with self._torch.no_grad():
            if self._device == "cuda":
                return self._run_graph(calls)
            size = len(self._pool)
            batch = [self._pool[(first + i) % size] for i in range(instances * calls)]
            start = time.perf_counter()
            held = [self._call(*pair) for pair in batch]  # as a jitted call holds its results
            elapsed_s = time.perf_counter() - start
            return 1e6 * elapsed_s / len(held)

    def _run_graph(self, calls: int) -> float:
        torch = self._torch
        if self._graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # cuDNN's search, which cannot be captured
                for _ in range(3):
                    self._call(*self._pool[0])
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._captured = [self._call(*pair) for pair in self._pool]
            self._graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / (calls * len(self._pool))
