"""A network packed for one GPU: matrices, thresholds, read-out, and the launch plans of its layers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from eventrnn.cuda import tables, tensor_core_tiles
from eventrnn.cuda.cluster_plan import CLUSTER_SIZES, ClusterShape, cluster_plan
from eventrnn.cuda.cublas import Cublas
from eventrnn.cuda.gated_layer import GatedLayer, GatedPlan
from eventrnn.cuda.gated_matrix import GatedMatrix
from eventrnn.cuda.look_up import LookUpTable
from eventrnn.cuda.matrix import Matrix
from eventrnn.cuda.packing import check_format, per_strip
from eventrnn.cuda.plan import Chip, LayerShape, Plan, launches_of, plan, roles_of, tile_width
from eventrnn.cuda.tables import LANES
from eventrnn.cuda.tensor_core_layer import MIN_STREAMS, TensorLayer, exact_because, has_grid
from eventrnn.weights import Dense, GatedBlocks, MatrixId, Weights

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.network import Network


# Units from which on a dense layer whose units are all active has a time loop of its own for one sample. It was
# measured at 1536 units only, where it takes 0.4 to 0.65 of the time of the general plan.
MIN_LOOP_UNITS = 512


class DeviceNetwork:
    """The part of an engine that no run changes. Plans and device tables are made at their first use and kept.

    `tensor_layers`, in the methods below, are the layers that go through tensor cores; the others go by events.

    Attributes
    ----------
    network     : the network on the host
    device      : the GPU
    precision   : type of the operands on tensor cores; None if every layer stays exact
    units       : per layer, the number of units
    gates       : per layer, the gate rows of a unit
    output_size : columns of the output: V of a read-out, else the units of the last layer
    names       : the names of the matrices, by their number
    w_in, w_rec : per layer, the weights of the input and of the recurrent product
    gated       : per layer, its time loop where its recurrent matrix has gated blocks; None for other layers. `loop`
                  adds those of dense layers that run for one sample
    thresholds  : per layer, the thresholds in strips, on the device
    readout     : the weights of the read-out, or None
    clocks      : (blocks, warps, `tables.TURN_PHASES`) int64 on the device, to which the kernels of clusters write the
                  cycles of their phases; None, except while `experiments/gpu_phases.py` measures
    block_tables : by (layers, batch, first sample), the block table of a launch on the device, and its number of blocks
    """

    def __init__(self, network: Network, device: Device, precision: str | None):
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.device, self.precision = network, device, precision
        self.units = [layer.units for layer in network.layers]
        self.gates = [layer.cell.gates for layer in network.layers]
        sizes = {*CLUSTER_SIZES, *(tensor_core_tiles.CLUSTER_SIZES if precision else ())}
        clusters = {size: device.clusters(size) for size in sizes}
        self.chip = Chip(device.multiprocessors, device.shared_bytes, clusters)
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        self.names = list(network.matrices())
        self.w_in: list[Matrix | GatedMatrix | LookUpTable] = []
        self.w_rec: list[Matrix | GatedMatrix] = []
        self.gated: list[GatedLayer | None] = []
        self.thresholds: list[Any] = []
        self.readout: Matrix | GatedMatrix | None = None
        self.clocks: Any = None
        self.block_tables: dict[tuple, tuple[Any, int]] = {}
        self._plans: dict[tuple, list[Plan | GatedPlan | None]] = {}
        self._dense_loops: dict[int, GatedLayer] = {}
        with device.on_stream():
            self._pack()

    def _pack(self) -> None:
        network, device = self.network, self.device
        for k, layer in enumerate(network.layers):
            # The general plan and the one of a single stream divide the GPU among the layers of a launch.
            share = self.chip.multiprocessors // next(len(each) for each in self.launches(MIN_STREAMS) if k in each)
            inside = (layer.w_rec, layer.w_in) if k else (layer.w_rec,)
            width = tile_width(layer.units, share, any(isinstance(w, Dense) for w in inside))
            w_rec = self._matrix(MatrixId.of(k, "w_rec"), layer.w_rec, layer.bias_rec, layer.cell.gates, width)
            self.w_rec.append(w_rec)
            self.gated.append(GatedLayer(device, layer, w_rec) if isinstance(w_rec, GatedMatrix) else None)
            if k == 0 and network.one_hot and isinstance(layer.w_in, Dense) and layer.w_in.storage == "float32":
                self.w_in.append(LookUpTable(device, layer.w_in, layer.bias_in))
            else:
                name = MatrixId.of(k, "w_in")
                self.w_in.append(
                    self._matrix(name, layer.w_in, layer.bias_in, layer.cell.gates, width, tiled=self._is_full(k))
                )
            self.thresholds.append(device.put(per_strip(layer.threshold, 1, width)))
        if network.readout is not None:
            name = MatrixId("readout")
            self.readout = self._matrix(name, network.readout.weights, network.readout.bias, 1, LANES)

    def _matrix(
        self, name: MatrixId, weights: Weights, bias, gates: int, width: int, *, tiled: bool = False
    ) -> Matrix | GatedMatrix:
        if isinstance(weights, GatedBlocks):
            return GatedMatrix(self.device, weights, bias, gates, self.names.index(name))
        return Matrix(self.device, weights, bias, gates, width, tiled=tiled)

    def _is_full(self, k: int) -> bool:
        """Whether most inputs of a layer are taken to be active: those of plain cells that do not read symbols."""
        if k:
            return not self.network.layers[k - 1].cell.thresholded
        return self.network.symbols is None and not self.network.layers[0].cell.thresholded

    def drives_first(self, k: int, batch: int) -> bool:
        """Whether the input drives of layer k are computed for all steps before the layer is launched."""
        return k == 0 or self.loop(k, batch) is not None or isinstance(self.w_in[k], GatedMatrix)

    def loop(self, k: int, batch: int) -> GatedLayer | None:
        """The time loop of a layer with gated blocks or, for one sample, of a wide dense one with all units active.

        None for other layers, which follow another plan.
        """
        if not self._is_wide(k, batch):
            return self.gated[k]
        layer = self.network.layers[k]
        if k not in self._dense_loops:
            number = self.names.index(MatrixId.of(k, "w_rec"))
            assert isinstance(layer.w_rec, Dense)
            matrix = GatedMatrix.of_dense(self.device, layer.w_rec, layer.bias_rec, layer.cell.gates, number)
            self._dense_loops[k] = GatedLayer(self.device, layer, matrix)
        return self._dense_loops[k]

    def _is_wide(self, k: int, batch: int) -> bool:
        """Whether `loop` makes a time loop for a dense layer."""
        layer = self.network.layers[k]
        wide = isinstance(layer.w_rec, Dense) and layer.units >= MIN_LOOP_UNITS
        return batch == 1 and wide and not layer.cell.thresholded and not layer.cell.reset_first

    # --- tensor cores ---

    @cached_property
    def exact_because(self) -> list[str | None]:
        """Per layer, the reason why it cannot go through tensor cores; None where it can."""
        assert self.precision is not None
        reasons = [exact_because(layer, self.precision) for layer in self.network.layers]
        # Tensor cores would multiply the rows of all symbols.
        return ["its symbols are looked up", *reasons[1:]] if self.network.one_hot else reasons

    @cached_property
    def tensors(self) -> list[TensorLayer | None]:
        """Per layer, its rounded weights for tensor cores; None where it cannot go through them."""
        precision, device = self.precision, self.device
        assert precision is not None
        able = [reason is None for reason in self.exact_because]
        with device.on_stream():
            cublas = Cublas(device) if any(able) else None
            made = zip(self.network.layers, able, strict=True)
            return [
                TensorLayer.of(device, cublas, each, precision, self.chip) if cublas and can else None
                for each, can in made
            ]

    def tensor_able(self, batch: int) -> list[int]:
        """The layers that may go through tensor cores with so many samples."""
        # Few streams: tables of tensor cores, and cuBLAS, are not made unless registers of the GPU may hold a layer.
        reasons = zip(self.network.layers, self.exact_because, strict=True)
        if batch < MIN_STREAMS and not any(why is None and has_grid(each, batch, self.chip) for each, why in reasons):
            return []
        able = [(k, layer) for k, layer in enumerate(self.tensors) if layer is not None]
        return [k for k, layer in able if batch >= MIN_STREAMS or layer.grid(batch) is not None]

    # --- plans ---

    def launches(self, batch: int, tensor_layers: tuple[int, ...] = ()) -> list[range]:
        """The layers of each launch, from the input to the output."""
        kinds = [(layer.cell.name, layer.cell.variant) for layer in self.network.layers]
        layers = enumerate(self.network.layers)
        gated = [k for k, layer in layers if any(isinstance(w, GatedBlocks) for w in (layer.w_in, layer.w_rec))]
        gated += [k for k in range(len(kinds)) if self._is_wide(k, batch)]
        return launches_of(kinds, self.chip.multiprocessors, (*tensor_layers, *gated))

    def plans(self, batch: int, tensor_layers: tuple[int, ...]) -> list[Plan | GatedPlan | None]:
        """The plan of each launch for `batch` samples; None for a layer that goes through tensor cores."""
        key = (batch, tensor_layers)
        if key not in self._plans:
            self._plans[key] = [
                None if layers.start in tensor_layers else self._plan(layers, batch)
                for layers in self.launches(batch, tensor_layers)
            ]
        return self._plans[key]

    def _plan(self, layers: range, batch: int) -> Plan | GatedPlan:
        loop = self.loop(layers.start, batch)
        if loop is not None:
            return loop.plan(batch)
        clustered = self._cluster_plan(layers, batch)
        if clustered is not None:
            return clustered
        shapes = [
            LayerShape(
                self.units[k],
                self.network.layers[k].inputs,
                None if self.drives_first(k, batch) else self.plain(self.w_in[k]).strips,
                self.plain(self.w_rec[k]).strips,
            )
            for k in layers
        ]
        return plan(shapes, batch, self.chip)

    @staticmethod
    def plain(matrix: Matrix | GatedMatrix | LookUpTable) -> Matrix:
        """A matrix of a launch by events, whose blocks are not gated."""
        assert isinstance(matrix, Matrix)
        return matrix

    def _cluster_plan(self, layers: range, batch: int) -> Plan | None:
        matrices = [self.w_rec[k] for k in layers] + [self.w_in[k] for k in layers if k]
        cell = self.network.layers[layers.start].cell
        # Clusters gather the few units that sent an event, and have one exchange of outputs per step.
        unfit = not cell.thresholded or cell.reset_first
        if unfit or not any(self.chip.clusters.values()) or not all(each.sparse for each in matrices):
            return None
        shapes = [
            ClusterShape(
                self.units[k], self.plain(self.w_in[k]).compact if k else None, self.plain(self.w_rec[k]).compact
            )
            for k in layers
        ]
        return cluster_plan(shapes, batch, self.chip)

    def paths(self, batch: int, tensor_layers: tuple[int, ...]) -> dict[str, str]:
        """By matrix, the layout of its weights and the memory that they are read from."""
        found: dict[str, str] = {}
        plans = self.plans(batch, tensor_layers)
        for layers, each in zip(self.launches(batch, tensor_layers), plans, strict=True):
            if each is None:
                layer = self.tensors[layers.start]
                assert layer is not None
                found[MatrixId.of(layers.start, "w_rec")] = layer.path(batch)
                found[MatrixId.of(layers.start, "w_in")] = f"tensor {self.precision}"
                continue
            k = layers.start
            loop = self.loop(k, batch)
            if loop is not None:
                found[MatrixId.of(k, "w_rec")] = loop.w_rec.product_description
                found[MatrixId.of(k, "w_in")] = self.w_in[k].product_description
                continue
            assert not isinstance(each, GatedPlan)
            for (k, is_input), layout in zip(roles_of(layers, each), each.layers, strict=True):
                w_in, w_rec = MatrixId.of(k, "w_in"), MatrixId.of(k, "w_rec")
                if not is_input:
                    found[w_rec] = self.plain(self.w_rec[k]).layout_description(layout.layout_rec, each.cluster)
                if self.drives_first(k, batch):
                    found[w_in] = self.w_in[k].product_description
                elif is_input or not each.cluster:
                    found[w_in] = self.plain(self.w_in[k]).layout_description(layout.layout_in, each.cluster)
        if self.precision and batch >= MIN_STREAMS:
            for k, reason in enumerate(self.exact_because):
                for role in ("w_rec", "w_in") if reason else ():
                    found[MatrixId.of(k, role)] += f", exact: {reason}"
        if self.readout is not None:
            found[MatrixId("readout")] = self.readout.product_description
        return found

    # --- status words ---

    @property
    def status_words(self) -> int:
        """The int64 words of a status array: faults, then the event counts of the input and of every layer."""
        return self.counts_from(len(self.units))

    def counts_from(self, k: int) -> int:
        """The status word at which the event counts of layer k begin: graded events per unit, then binary ones."""
        return tables.STATUS_FIELDS + 2 * (self.counted_inputs + sum(self.units[:k]))

    @property
    def counted_inputs(self) -> int:
        """The inputs whose events a run counts; none where they are symbols, which the host counts."""
        return 0 if self.network.symbols is not None else self.network.layers[0].inputs
