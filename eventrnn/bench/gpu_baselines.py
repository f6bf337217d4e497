"""Baselines on a GPU, on the same weights.

`cudnn-persistent` : cuDNN's GRU and LSTM through its C API, with the fastest of all its algorithms
`cudnn`      : torch.nn.GRU (cuDNN as PyTorch calls it), in the fastest of float32, TF32, padded TF32 and padded float16
`evnn-style` : the method of EvNN: one product for the inputs of all steps, then per step a dense product and a kernel
               for the cells; all in one CUDA graph, so that there is no launch latency
`cusparse`   : the same with the recurrent weights as CSR in cuSPARSE
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from eventrnn.bench.baselines import import_torch, product_bound, torch_gru
from eventrnn.bench.cudnn_library import Cudnn, find_cudnn
from eventrnn.bench.cudnn_persistent import cudnn_runs
from eventrnn.events import Events
from eventrnn.network import Layer, Network

# cuDNN is fastest where every dimension is a multiple of this number.
PADDED_TO = 8

CELL_THREADS = 128

Seconds = Callable[[], float]


@dataclass
class GpuBaselines:
    """The named baselines of a network on a GPU.

    runs        : variant -> function that returns the GPU seconds of one run
    first_seconds : variant -> seconds of its fastest first run, of the variants that `cudnn-persistent` tried
    left_out    : variant -> why it cannot run
    versions    : library -> version, where it is no Python package
    """

    runs: dict[str, Seconds] = field(default_factory=dict)
    first_seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def baselines(
    names: tuple[str, ...], network: Network, inputs: Events, report: Callable[[str], None] = lambda stage: None
) -> GpuBaselines:
    """Prepare and check the named baselines; `report` is called with the name of each stage.

    Raises ValueError where a package that one needs is not installed, RuntimeError where one computes something else.
    """
    found = GpuBaselines()
    for name in names:
        if name == "cudnn-persistent":
            _every_cudnn(found, network, inputs, report)
            continue
        torch = import_torch()
        if not torch.cuda.is_available():
            raise ValueError("against: this torch has no CUDA; install one that has, or use --against none")
        if name == "cudnn":
            found.runs |= _cudnn(torch, network, inputs)
        else:
            found.runs[name] = _stepwise(torch, network, inputs, sparse=name == "cusparse")
    return found


def _every_cudnn(found: GpuBaselines, network: Network, inputs: Events, report: Callable[[str], None]) -> None:
    """Add the variants of `cudnn-persistent`."""
    from eventrnn.cuda.device import current_device

    device = current_device()
    with device.on_stream():
        made = cudnn_runs(Cudnn(find_cudnn(device), device), network, inputs, report)
    found.runs |= {name: partial(device.seconds, run) for name, run in made.runs.items()}
    found.first_seconds |= made.first
    found.left_out |= made.left_out
    found.versions["cudnn"] = made.version


def _cudnn(torch, network: Network, inputs: Events) -> dict[str, Seconds]:
    """torch.nn.GRU on the GPU with the same weights made dense, plain and padded with zeros to multiples of 8."""
    plain, x = torch_gru(network).cuda(), torch.from_numpy(inputs.to_dense()).cuda()
    padded, wide = _padded(torch, plain), -plain.input_size % PADDED_TO
    padded_x = torch.nn.functional.pad(x, (0, wide))

    _check(torch, plain, padded, x, padded_x)
    half, half_x = _padded(torch, plain).half(), padded_x.half()
    half.flatten_parameters()
    return {
        "cudnn float32": timed(torch, plain, x, False),
        "cudnn tf32": timed(torch, plain, x, True),
        "cudnn tf32 padded": timed(torch, padded, padded_x, True),
        "cudnn float16 padded": timed(torch, half, half_x, True),
    }


def timed(torch, module, inputs, tf32: bool) -> Seconds:
    """A function that returns the GPU seconds of one run of a module of torch, with TF32 in cuDNN allowed or not."""

    def measure() -> float:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with torch.inference_mode():
                begin.record()
                module(inputs)
                end.record()
            end.synchronize()
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return begin.elapsed_time(end) / 1e3

    return measure


def _padded(torch, gru):
    """The same GRU with inputs and units padded to multiples of `PADDED_TO`; padding units stay at zero."""
    inputs, hidden = (-(-n // PADDED_TO) * PADDED_TO for n in (gru.input_size, gru.hidden_size))
    wide = torch.nn.GRU(inputs, hidden, gru.num_layers).cuda()
    with torch.no_grad():
        for name, target in wide.named_parameters():
            source, gates = getattr(gru, name), target.view(3, hidden, -1)
            target.zero_()
            source = source.view(3, gru.hidden_size, -1)
            gates[:, : source.shape[1], : source.shape[2]] = source
    wide.flatten_parameters()
    return wide


def _check(torch, plain, padded, x, padded_x) -> None:
    """Compare one step of the plain and the padded GRU, within the rounding of float32 sums. Raises RuntimeError."""
    with torch.inference_mode():
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            a, b = plain(x[:1])[0], padded(padded_x[:1])[0][..., : plain.hidden_size]
        finally:
            torch.backends.cudnn.allow_tf32 = before
    if not torch.allclose(a, b, rtol=0, atol=plain.hidden_size * 2.0**-20):
        raise RuntimeError(f"against cudnn: the padded GRU is {float((a - b).abs().max()):.1e} from the plain one")


# --- step by step -------------------------------------------------------------------------------------------


def _stepwise(torch, network: Network, inputs: Events, sparse: bool) -> Seconds:
    """One CUDA graph of all layers and steps, float32 with TF32 allowed."""
    from eventrnn.cuda.device import current_device

    device = current_device()
    kernel = device.kernel(("cells",), _cells_kernel, CELL_THREADS)
    stream = torch.cuda.ExternalStream(int(device.stream.handle))
    x = torch.from_numpy(inputs.to_dense()).cuda()
    steps, batch, _ = x.shape
    layers = [_Stepped(torch, layer, steps, batch, sparse) for layer in network.layers]

    def run() -> None:
        below = x
        for each in layers:
            each.cells.zero_()
            torch.addmm(each.bias_in, below.reshape(steps * batch, -1), each.w_in, out=each.drive)
            sent = each.nothing
            for t in range(steps):
                strides = each.product(sent)
                drives = each.drive.data_ptr() + 12 * t * batch * each.units, each.rec.data_ptr(), *strides
                vectors = (each.bias_rec, each.threshold, each.cells, each.sent[t])
                arguments = *drives, *(vector.data_ptr() for vector in vectors), each.units, batch
                device.launch(kernel, -(-batch * each.units // CELL_THREADS), CELL_THREADS, *arguments)
                sent = each.sent[t]
            below = each.sent

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                run()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return lambda: device.seconds(replay)


class _Stepped:
    """One layer on the GPU, with the buffers of its steps.

    drive : input drives of all steps, (steps * batch, 3 N)
    rec   : recurrent drives of one step, (batch, 3 N), or (3 N, batch) for cuSPARSE
    sent  : outputs, (steps, batch, N)
    cells : cells, (batch, N)
    """

    def __init__(self, torch, layer: Layer, steps: int, batch: int, sparse: bool):
        def put(array: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(array)).cuda()

        self.torch, self.units, self.sparse = torch, layer.units, sparse
        dense = layer.w_rec.to_dense()
        self.w_in, self.bias_in, self.bias_rec = map(put, (layer.w_in.to_dense(), layer.bias_in, layer.bias_rec))
        with warnings.catch_warnings():
            # PyTorch warns once that its CSR support is in beta.
            warnings.simplefilter("ignore", UserWarning)
            self.w_rec = put(dense.T).to_sparse_csr() if sparse else put(dense)
        self.threshold = put(np.broadcast_to(layer.threshold, layer.units).astype(np.float32))
        self.drive = torch.empty(steps * batch, 3 * layer.units, device="cuda")
        self.rec = torch.empty((3 * layer.units, batch) if sparse else (batch, 3 * layer.units), device="cuda")
        self.sent = torch.empty(steps, batch, layer.units, device="cuda")
        self.cells, self.nothing = (torch.zeros(batch, layer.units, device="cuda") for _ in range(2))
        self._check(dense, batch)

    def product(self, sent) -> tuple[int, int]:
        """Compute the recurrent product of one step into `rec`, without bias.

        Returns the strides of `rec`, in floats, from one sample and from one gate row to the next.
        """
        if self.sparse:
            self.torch.mm(self.w_rec, sent.T, out=self.rec)
            return 1, self.rec.shape[1]
        self.torch.mm(sent, self.w_rec, out=self.rec)
        return self.rec.shape[1], 1

    def _check(self, dense: np.ndarray, batch: int) -> None:
        """Compare the product with NumPy's, within the rounding of float32 sums. Raises RuntimeError."""
        y = np.random.default_rng(0).standard_normal((batch, self.units)).astype(np.float32)
        with self.torch.inference_mode():
            self.product(self.torch.from_numpy(y).cuda())
        got = self.rec.cpu().numpy()
        got = got.T if self.sparse else got
        if not (np.abs(got - y @ dense) <= product_bound(dense, y)).all():
            raise RuntimeError("against: a baseline computes another product than ours; is TF32 forced on?")


def _cells_kernel():
    """The kernel that updates cells and sends events in one step from ready drives, and its signature.

    One thread per unit and sample. All arrays are float32 in global memory, given by address: drive (batch, 3 N), rec
    with the strides `sample_stride` and `row_stride` in floats, bias (3 N), threshold (N), cells and sent (batch, N).
    """
    from numba import int64, types

    from eventrnn.cuda import device
    from eventrnn.cuda.kernels import ptx

    # What Numba compiles has no Python types.
    cuda: Any = device.cuda
    egru_value: Any = ptx.egru_value
    global_float32: Any = ptx.global_float32

    def cells(drive_at, rec_at, sample_stride, row_stride, bias_at, threshold_at, cells_at, sent_at, units, batch):
        at = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if at >= units * batch:
            return
        sample = at // units
        unit = at - sample * units
        drive, bias = global_float32(drive_at + 12 * sample * units), global_float32(bias_at)
        rec, carried = global_float32(rec_at + 4 * sample * sample_stride), global_float32(cells_at)
        rec_u = rec[unit * row_stride] + bias[unit]
        rec_r = rec[(units + unit) * row_stride] + bias[units + unit]
        rec_g = rec[(2 * units + unit) * row_stride] + bias[2 * units + unit]
        in_u, in_r, in_g = drive[unit], drive[units + unit], drive[2 * units + unit]
        v, _, _, _ = egru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, carried[at])
        threshold, value = global_float32(threshold_at)[unit], np.float32(0)
        if v > threshold:
            value = v
            v = v - threshold
        carried[at], global_float32(sent_at)[at] = v, value

    return cells, types.void(*[types.int64] * 10)
