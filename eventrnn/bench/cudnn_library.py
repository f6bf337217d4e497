"""cuDNN's recurrent networks through its C API, by ctypes: all algorithms, not only the one that PyTorch picks.

The library is found where it is installed, and is never a dependency. Constants and signatures are those of cuDNN 9
(`cudnn_graph.h`, `cudnn_ops.h`, `cudnn_adv.h`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int32, c_size_t, c_uint32, c_ulonglong, c_void_p
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from typing import Any

import numpy as np

# Python packages that may bring the library, and the names under which the loader may know it.
PACKAGES, NAMES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"), ("libcudnn.so.9", "libcudnn.so.8", "libcudnn.so")

# NVIDIA's libraries that cuDNN loads by name while it runs: cuBLAS, and the compiler of dynamic persistent kernels.
NEEDED = ("cublasLt", "cublas", "nvrtc")

#: `cudnnRNNAlgo_t`
ALGORITHMS = {"standard": 0, "persist-static": 1, "persist-dynamic": 2, "persist-static-small-h": 3}

#: `cudnnRNNMode_t`
CELLS = {"lstm": 2, "gru": 3}

# By cell, the number in cuDNN (`linLayerID`) of each of our gates: (u, r, g), and (i, f, g, o).
GATE_NUMBERS = {"gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}

# `cudnnDataType_t`, `cudnnMathType_t`.
FLOAT, HALF = 0, 2
DEFAULT_MATH, TENSOR_OP_MATH, FMA_MATH = 0, 1, 3

# `cudnnRNNBiasMode_t`: one bias for the input product and one for the recurrent one.
DOUBLE_BIAS = 2

#: `cudnnForwardMode_t`
FORWARD_MODES = {"inference": 0, "training": 1}

# `cudnnRNNDataLayout_t`: rows of a step lie together, without padding between samples.
PACKED = 1

# Longest message that is asked for.
MESSAGE_BYTES = 512


class CudnnError(RuntimeError):
    """cuDNN refused a call: the function, the name of the status, and cuDNN's own message where it has one."""


@dataclass(frozen=True)
class Precision:
    """Types of a network: of its data and weights, of its sums, and which units may multiply.

    unit : unit roundoff of the stored numbers and of the sums, the larger one
    """

    data: int
    sums: int
    math: int
    dtype: type[np.floating]
    unit: float


#: name -> precision. TF32 rounds factors to 11 bits.
PRECISIONS = {
    "float16": Precision(HALF, FLOAT, TENSOR_OP_MATH, np.float16, 2.0**-11),
    "float16, sums in float16": Precision(HALF, HALF, TENSOR_OP_MATH, np.float16, 2.0**-11),
    "tf32": Precision(FLOAT, FLOAT, DEFAULT_MATH, np.float32, 2.0**-11),
    "float32": Precision(FLOAT, FLOAT, FMA_MATH, np.float32, 2.0**-24),
}


@dataclass(frozen=True)
class RnnShape:
    """Sizes of a network and of a run: layers of `hidden` units, the first one on `inputs` inputs."""

    layers: int
    inputs: int
    hidden: int
    steps: int
    batch: int


@dataclass(frozen=True)
class GateWeights:
    """One layer as NumPy arrays, gates packed as in `cells.py`.

    w_in     : (I, G N)
    w_rec    : (N, G N)
    bias_in  : (G N,)
    bias_rec : (G N,)
    """

    w_in: np.ndarray
    w_rec: np.ndarray
    bias_in: np.ndarray
    bias_rec: np.ndarray


def find_cudnn(device: Any) -> Any:
    """Load cuDNN: from its Python package, or by its name. Raises ValueError with what was tried.

    device : loads the libraries that cuDNN needs (`cuda.device.Device.load_library`)
    """
    for name in NEEDED:
        # Without one of these libraries some algorithms fail, and their errors say so.
        with suppress(OSError, ImportError, RuntimeError):
            device.load_library(name)
    tried = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            tried += [str(each.locate()) for each in files(package) or () if each.name.startswith("libcudnn.so")]
    reasons = []
    for path in (*tried, *NAMES):
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            reasons.append(str(error))
    raise ValueError(
        f"against: cudnn-persistent needs cuDNN, which was not found ({'; '.join(reasons)}); pip install "
        f"{PACKAGES[0]}, or use --against none"
    )


class Cudnn:
    """A handle of cuDNN on the stream of a device. Raises CudnnError where cuDNN cannot make one.

    library : the loaded library (`find_cudnn`), or an object with the same functions
    version : of the library, such as 9.19.0
    """

    def __init__(self, library: Any, device: Any):
        self.shared_library, self.device = library, device
        library.cudnnGetErrorString.restype = ctypes.c_char_p
        library.cudnnGetVersion.restype = c_size_t
        number = int(library.cudnnGetVersion())
        self.version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        self.handle = self.made("cudnnCreate")
        self.call("cudnnSetStream", self.handle, c_void_p(device.queue.ptr))

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of cuDNN. Raises CudnnError unless it succeeds."""
        status = getattr(self.shared_library, function)(*arguments)
        if status:
            name, message = self.shared_library.cudnnGetErrorString(status), ctypes.create_string_buffer(MESSAGE_BYTES)
            with suppress(AttributeError):  # new in version 9
                self.shared_library.cudnnGetLastErrorString(message, c_size_t(MESSAGE_BYTES))
            reason = f" ({message.value.decode(errors='replace')})" if message.value else ""
            raise CudnnError(f"{function}: {name.decode()}{reason}")

    def made(self, function: str) -> c_void_p:
        """What a `cudnnCreate...` function makes."""
        made = c_void_p()
        self.call(function, byref(made))
        return made


class CudnnRnn:
    """One network in cuDNN, with the device memory that it needs. Raises CudnnError where cuDNN does not support it,
    and MemoryError.

    cell, algorithm, precision : keys of `CELLS`, `ALGORITHMS` and `PRECISIONS`
    weights : the weights and biases of all layers, in cuDNN's order, as bytes on the device
    """

    def __init__(self, cudnn: Cudnn, cell: str, algorithm: str, precision: str, shape: RnnShape):
        self.cudnn, self.cell, self.precision, self.shape = cudnn, cell, PRECISIONS[precision], shape
        self._made: list[tuple[str, c_void_p]] = []
        try:
            self._describe(ALGORITHMS[algorithm])
            if algorithm == "persist-dynamic":
                cudnn.call("cudnnBuildRNNDynamic", cudnn.handle, self.rnn, c_int(shape.batch))
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _describe(self, algorithm: int) -> None:
        cudnn, shape, kind = self.cudnn, self.shape, self.precision
        dropout, none = self._descriptor("Dropout"), c_void_p()
        cudnn.call("cudnnSetDropoutDescriptor", dropout, cudnn.handle, c_float(0), none, c_size_t(0), c_ulonglong(0))
        self.rnn = self._descriptor("RNN")
        kinds = (algorithm, CELLS[self.cell], DOUBLE_BIAS, 0, 0, kind.data, kind.sums, kind.math)
        sizes = (shape.inputs, shape.hidden, shape.hidden, shape.layers)
        numbers = (*map(c_int, kinds), *map(c_int32, sizes))
        cudnn.call("cudnnSetRNNDescriptor_v8", self.rnn, *numbers, dropout, c_uint32(0))
        lengths = (c_int * shape.batch)(*[shape.steps] * shape.batch)
        self.x_rows, self.y_rows = self._descriptor("RNNData"), self._descriptor("RNNData")
        for rows, width in ((self.x_rows, shape.inputs), (self.y_rows, shape.hidden)):
            sizes = map(c_int, (kind.data, PACKED, shape.steps, shape.batch, width))
            cudnn.call("cudnnSetRNNDataDescriptor", rows, *sizes, lengths, none)
        self.state = self._descriptor("Tensor")
        dimensions = (shape.layers, shape.batch, shape.hidden)
        strides = (shape.batch * shape.hidden, shape.hidden, 1)
        arrays = ((c_int * 3)(*dimensions), (c_int * 3)(*strides))
        cudnn.call("cudnnSetTensorNdDescriptor", self.state, c_int(kind.data), c_int(3), *arrays)

    def _descriptor(self, kind: str) -> c_void_p:
        made = self.cudnn.made(f"cudnnCreate{kind}Descriptor")
        self._made.append((f"cudnnDestroy{kind}Descriptor", made))
        return made

    def _allocate(self) -> None:
        cudnn, shape = self.cudnn, self.shape
        device, size, work, kept = cudnn.device, c_size_t(), c_size_t(), c_size_t()
        cudnn.call("cudnnGetRNNWeightSpaceSize", cudnn.handle, self.rnn, byref(size))
        self.weights = device.empty((size.value,), np.uint8)
        sizes = {}
        for name, mode in FORWARD_MODES.items():
            found = (byref(work), byref(kept))
            cudnn.call("cudnnGetRNNTempSpaceSizes", cudnn.handle, self.rnn, c_int(mode), self.x_rows, *found)
            sizes[name] = work.value, kept.value
        self.work = device.empty((max(1, *(each[0] for each in sizes.values())),), np.uint8)
        self.kept = device.empty((max(1, sizes["training"][1]),), np.uint8)
        self.lengths = device.put(np.full(shape.batch, shape.steps, np.int32))
        self.x = device.put(np.zeros((shape.steps, shape.batch, shape.inputs), self.precision.dtype))
        self.y = device.empty((shape.steps, shape.batch, shape.hidden), self.precision.dtype)

    def load(self, layers: Sequence[GateWeights], x: np.ndarray) -> None:
        """Copy weights and inputs (steps, batch, I) to the device, with zeros for inputs and units that they lack.

        Raises CudnnError where a matrix in cuDNN has another shape than is expected.
        """
        kind, base, gates = self.precision.dtype, self.weights.data.ptr, GATE_NUMBERS[self.cell]
        host = np.zeros(self.weights.nbytes, np.uint8)
        for k, layer in enumerate(layers):
            for product, (matrix, bias) in enumerate(((layer.w_in, layer.bias_in), (layer.w_rec, layer.bias_rec))):
                n_pre = self.shape.hidden if k or product else self.shape.inputs
                parts = np.split(matrix, len(gates), axis=1), np.split(bias, len(gates))
                for number, rows, biases in zip(gates, *parts, strict=True):
                    at, bias_at = self._addresses(k, number + len(gates) * product, n_pre)
                    for offset, part, shape in (
                        (at - base, rows.T, (self.shape.hidden, n_pre)),
                        (bias_at - base, biases[:, None], (self.shape.hidden, 1)),
                    ):
                        place = host[offset:].view(np.uint8)[: shape[0] * shape[1] * np.dtype(kind).itemsize]
                        place.view(kind).reshape(shape)[: part.shape[0], : part.shape[1]] = part
        self.weights.set(host)
        inputs = np.zeros((self.shape.steps, self.shape.batch, self.shape.inputs), kind)
        inputs[: x.shape[0], :, : x.shape[2]] = x
        self.x.set(inputs)

    def _addresses(self, layer: int, number: int, n_pre: int) -> tuple[int, int]:
        """Where the matrix (hidden, n_pre) and the bias of that number of a layer lie, as addresses."""
        cudnn, weights = self.cudnn, self.weights
        matrix, bias = (self._descriptor("Tensor") for _ in range(2))
        at, bias_at = c_void_p(), c_void_p()
        space = (c_int32(layer), c_size_t(weights.nbytes), c_void_p(weights.data.ptr), c_int32(number))
        found = (matrix, byref(at), bias, byref(bias_at))
        cudnn.call("cudnnGetRNNWeightParams", cudnn.handle, self.rnn, *space, *found)
        for tensor, need in ((matrix, (1, self.shape.hidden, n_pre)), (bias, (1, self.shape.hidden, 1))):
            kind, count, sizes, strides = c_int(), c_int(), (c_int * 3)(), (c_int * 3)()
            cudnn.call("cudnnGetTensorNdDescriptor", tensor, c_int(3), byref(kind), byref(count), sizes, strides)
            if tuple(sizes) != need:
                raise CudnnError(f"cudnnGetRNNWeightParams: got a tensor of shape {tuple(sizes)}, expected {need}")
        return int(at.value or 0), int(bias_at.value or 0)

    def forward(self, mode: str = "inference") -> None:
        """Put a run of all steps from a zero state on the stream: `x` to `y`.

        mode : a key of `FORWARD_MODES`; "training" also keeps what a backward pass would need
        """
        cudnn, none = self.cudnn, c_void_p()
        kept = self.kept.nbytes if mode == "training" else 0
        cudnn.call(
            "cudnnRNNForward",
            *(cudnn.handle, self.rnn, c_int(FORWARD_MODES[mode]), c_void_p(self.lengths.data.ptr)),
            *(self.x_rows, c_void_p(self.x.data.ptr), self.y_rows, c_void_p(self.y.data.ptr)),
            *(self.state, none, none, self.state, none, none),
            *(c_size_t(self.weights.nbytes), c_void_p(self.weights.data.ptr)),
            *(c_size_t(self.work.nbytes), c_void_p(self.work.data.ptr)),
            *(c_size_t(kept), c_void_p(self.kept.data.ptr) if kept else none),
        )

    def close(self) -> None:
        """Free the descriptors; the network cannot be used afterwards."""
        while self._made:
            function, made = self._made.pop()
            getattr(self.cudnn.shared_library, function)(made)
