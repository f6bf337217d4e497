"""Update rules of the optimisers, in place, in one pass over the elements each.

A call runs on one thread and handles one parameter. All arrays are flat float32 of equal length: the parameter, its
gradient, and the optimiser's state. `decay` is weight decay apart from the gradient, `l2` adds `l2 * parameter` to the
gradient; both are per update, before the learning rate `rate`.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled


@compiled
def adam(parameter, gradient, first, second, rate, beta1, beta2, correction1, correction2, epsilon, decay, l2):
    """Adam (Kingma and Ba 2015, algorithm 1), with decoupled decay as in AdamW (Loshchilov and Hutter 2019,
    algorithm 2).

    first, second             : running means of the gradient and of its square
    correction1, correction2  : 1 / (1 - beta ** steps) of either mean
    """
    for i in range(len(parameter)):
        g = gradient[i] + l2 * parameter[i]
        first[i] = beta1 * first[i] + (cells.ONE - beta1) * g
        second[i] = beta2 * second[i] + (cells.ONE - beta2) * g * g
        step = (first[i] * correction1) / (np.sqrt(second[i] * correction2) + epsilon)
        parameter[i] -= rate * (step + decay * parameter[i])


@compiled
def adam_without_first(parameter, gradient, second, rate, beta2, correction2, epsilon, decay, l2):
    """`adam` with beta1 = 0. The first moment is then the gradient itself: the same bits, one array less."""
    for i in range(len(parameter)):
        g = gradient[i] + l2 * parameter[i]
        second[i] = beta2 * second[i] + (cells.ONE - beta2) * g * g
        step = g / (np.sqrt(second[i] * correction2) + epsilon)
        parameter[i] -= rate * (step + decay * parameter[i])


@compiled
def descend(parameter, gradient, rate, decay, l2):
    """Gradient descent."""
    for i in range(len(parameter)):
        parameter[i] -= rate * (gradient[i] + l2 * parameter[i] + decay * parameter[i])


@compiled
def descend_with_momentum(parameter, gradient, velocity, rate, momentum, decay, l2):
    """Gradient descent with heavy-ball momentum, `velocity = momentum * velocity + gradient` (Polyak 1964)."""
    for i in range(len(parameter)):
        velocity[i] = momentum * velocity[i] + gradient[i] + l2 * parameter[i]
        parameter[i] -= rate * (velocity[i] + decay * parameter[i])


@compiled
def average(mean, parameter, share):
    """`mean += share * (parameter - mean)`, the running average of averaged descent."""
    for i in range(len(mean)):
        mean[i] += share * (parameter[i] - mean[i])
