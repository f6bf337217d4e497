"""A fake cuDNN in host memory: descriptors, weights in cuDNN's order, and the networks computed in float64.

It takes the arguments that the C functions take. `refused` names calls that fail; `planted` faults make wrong answers.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

NOT_SUPPORTED, NAMES = 3000, {0: b"CUDNN_STATUS_SUCCESS", 3000: b"CUDNN_STATUS_NOT_SUPPORTED"}
DTYPES = {0: np.float32, 2: np.float16}


def at(address, dtype, *shape: int) -> np.ndarray:
    """The array at an address."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(int(address)), dtype).reshape(shape)


class FakeCudnn:
    """Stands for the loaded library.

    refused : (algorithm, cell) of networks that are not supported
    planted : "gates" exchanges two gates, "bias" forgets one of the biases, "state" forgets the recurrent product
    calls   : the names of the functions that were called
    """

    def __init__(self, refused=(), planted: str = ""):
        self.refused, self.planted, self.calls, self.things = refused, planted, [], [None]
        self.cudnnGetVersion, self.cudnnGetErrorString, self.message = lambda: 91900, lambda status: NAMES[status], b""

    def __getattr__(self, name: str):
        if name.startswith("cudnnCreate"):
            call = self._create
        elif name.startswith(("cudnnDestroy", "cudnnSetStream", "cudnnSetDropout", "cudnnBuild")):
            call = self._nothing
        else:
            call = getattr(self, "_" + name.removeprefix("cudnn"))

        def counted(*arguments):
            self.calls.append(name)
            return call(*arguments) or 0

        return counted

    def _GetLastErrorString(self, buffer, size) -> None:
        buffer.value = self.message

    def _nothing(self, *arguments) -> None:
        return None

    def _create(self, made) -> None:
        self.things.append(SimpleNamespace())
        made._obj.value = len(self.things) - 1

    def _of(self, descriptor) -> SimpleNamespace:
        return self.things[descriptor.value]

    def _SetRNNDescriptor_v8(self, rnn, algorithm, cell, bias, direction, skip, data, sums, maths, *rest) -> int:
        inputs, hidden, projected, layers, _, _ = (getattr(each, "value", each) for each in rest)
        found = self._of(rnn)
        found.gates, found.cell, found.dtype = {2: 4, 3: 3}[cell.value], cell.value, DTYPES[data.value]
        found.inputs, found.hidden, found.layers = inputs, hidden, layers
        assert (bias.value, direction.value, skip.value, projected) == (2, 0, 0, hidden)
        self.message = b"no such kernel"
        return NOT_SUPPORTED if (algorithm.value, cell.value) in self.refused else 0

    def _SetRNNDataDescriptor(self, rows, data, layout, steps, batch, width, lengths, padding) -> None:
        found = self._of(rows)
        found.shape = (steps.value, batch.value, width.value)
        assert list(lengths) == [steps.value] * batch.value and layout.value == 1

    def _SetTensorNdDescriptor(self, tensor, data, count, sizes, strides) -> None:
        self._of(tensor).sizes = tuple(sizes)

    def _GetTensorNdDescriptor(self, tensor, asked, data, count, sizes, strides) -> None:
        sizes[:] = self._of(tensor).sizes

    def _places(self, rnn):
        """By layer and number, the offsets in numbers of a matrix and of its bias, and its presynaptic units."""
        offset, found = 0, {}
        for layer in range(rnn.layers):
            for number in range(2 * rnn.gates):
                n_pre = rnn.hidden if layer or number >= rnn.gates else rnn.inputs
                found[layer, number] = offset, offset + rnn.hidden * n_pre, n_pre
                offset += rnn.hidden * (n_pre + 1)
        return found, offset

    def _GetRNNWeightSpaceSize(self, handle, rnn, size) -> None:
        found = self._of(rnn)
        size._obj.value = self._places(found)[1] * np.dtype(found.dtype).itemsize

    def _GetRNNTempSpaceSizes(self, handle, rnn, mode, rows, work, kept) -> None:
        work._obj.value, kept._obj.value = 64, 32 * mode.value

    def _GetRNNWeightParams(self, handle, rnn, layer, size, space, number, matrix, matrix_at, bias, bias_at) -> None:
        found = self._of(rnn)
        begin, bias_begin, n_pre = self._places(found)[0][layer.value, number.value]
        itemsize = np.dtype(found.dtype).itemsize
        matrix_at._obj.value, bias_at._obj.value = space.value + itemsize * begin, space.value + itemsize * bias_begin
        self._of(matrix).sizes, self._of(bias).sizes = (1, found.hidden, n_pre), (1, found.hidden, 1)

    def _RNNForward(self, handle, rnn, mode, lengths, x_rows, x_at, y_rows, y_at, *rest) -> None:
        found = self._of(rnn)
        space = at(rest[7].value, found.dtype, self._places(found)[1]).astype(np.float64)
        x = at(x_at.value, found.dtype, *self._of(x_rows).shape).astype(np.float64)
        for layer in range(found.layers):
            x = self._layer(found, layer, space, x)
        at(y_at.value, found.dtype, *self._of(y_rows).shape)[...] = x

    def _layer(self, rnn, layer: int, space: np.ndarray, x: np.ndarray) -> np.ndarray:
        places, matrices, biases = self._places(rnn)[0], [], []
        for number in range(2 * rnn.gates):
            begin, bias, n_pre = places[layer, number]
            matrices.append(space[begin:bias].reshape(rnn.hidden, n_pre))
            biases.append(space[bias : bias + rnn.hidden] * (self.planted != "bias" or number != 0))
        if self.planted == "gates":
            matrices[0], matrices[1] = matrices[1], matrices[0]
        h = c = np.zeros((x.shape[1], rnn.hidden))
        outputs = []

        def squashed(drive):
            return 1 / (1 + np.exp(-drive))

        for each in x:
            inner = [each @ m.T + b for m, b in zip(matrices[: rnn.gates], biases, strict=False)]
            sent = h * (self.planted != "state")
            outer = [sent @ m.T + b for m, b in zip(matrices[rnn.gates :], biases[rnn.gates :], strict=True)]
            if rnn.cell == 3:
                r, u = (squashed(inner[k] + outer[k]) for k in range(2))
                h = u * h + (1 - u) * np.tanh(inner[2] + r * outer[2])
            else:
                i, f, o = (squashed(inner[k] + outer[k]) for k in (0, 1, 3))
                c = f * c + i * np.tanh(inner[2] + outer[2])
                h = o * np.tanh(c)
            outputs.append(h)
        return np.array(outputs)
