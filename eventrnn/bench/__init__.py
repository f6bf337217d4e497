"""Benchmarks: our engine beside its baselines in one run, interleaved; medians, without compile time.

case            the options of an inference benchmark, and which of them fit together
networks        random networks and events of a given size, sparsity and activity
inference       whole sequences of a network, or one product, on a CPU
gpu_inference   whole sequences on a GPU
training        one training window, forward and backward
gpu_training    the same on a GPU
baselines, gpu_baselines   the other libraries on the same weights, and the check that they compute the same
c_blocks        a product in blocks in C, compiled where there is a compiler
cudnn_persistent, cudnn_library   every algorithm of cuDNN's GRU and LSTM, through its C API
bandwidth       which weights a run reads, and a probe that only reads them
timing          interleaved repeats, and the figures of a timed case
crossover       whether backend="auto" picks the fastest kernel
masks           time and kept magnitude of transposable N:M masks
machine         processor, package versions, threads, FMA rate
"""

from __future__ import annotations

from eventrnn.bench.bandwidth import first_call as first_call
from eventrnn.bench.case import BASELINES as BASELINES
from eventrnn.bench.case import LAYER_BASELINES as LAYER_BASELINES
from eventrnn.bench.case import PRODUCT_BASELINES as PRODUCT_BASELINES
from eventrnn.bench.case import Case as Case
from eventrnn.bench.inference import inference as inference
from eventrnn.bench.machine import device as device
from eventrnn.bench.machine import gpu as gpu
from eventrnn.bench.machine import versions as versions
from eventrnn.bench.networks import at_activity as at_activity
from eventrnn.bench.networks import random_events as random_events
from eventrnn.bench.networks import random_network as random_network
from eventrnn.bench.networks import random_weights as random_weights
from eventrnn.bench.timing import interleaved as interleaved
from eventrnn.bench.training import TRAINING_BASELINES as TRAINING_BASELINES
from eventrnn.bench.training import TrainingCase as TrainingCase
from eventrnn.bench.training import training as training
