"""Update rules of the optimisers, one pass over the numbers each. All arrays flat, float32 and of one length."""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled


@compiled
def adam(parameter, gradient, first, second, rate, beta1, beta2, correction1, correction2, epsilon, decay, l2):
    """One Adam step in place: `decay` is decoupled (Loshchilov and Hutter 2019, algorithm 2), `l2` joins the
    gradient (Kingma and Ba 2015)."""
    for i in range(len(parameter)):
        g = gradient[i] + l2 * parameter[i]
        first[i] = beta1 * first[i] + (cells.ONE - beta1) * g
        second[i] = beta2 * second[i] + (cells.ONE - beta2) * g * g
        step = (first[i] * correction1) / (np.sqrt(second[i] * correction2) + epsilon)
        parameter[i] -= rate * (step + decay * parameter[i])


@compiled
def adam_without_first(parameter, gradient, second, rate, beta2, correction2, epsilon, decay, l2):
    """`adam` at beta1 = 0, where the first moment is the gradient itself: the same bits, a third less memory."""
    for i in range(len(parameter)):
        g = gradient[i] + l2 * parameter[i]
        second[i] = beta2 * second[i] + (cells.ONE - beta2) * g * g
        step = g / (np.sqrt(second[i] * correction2) + epsilon)
        parameter[i] -= rate * (step + decay * parameter[i])


@compiled
def descend(parameter, gradient, rate, decay, l2):
    """One step of gradient descent in place."""
    for i in range(len(parameter)):
        parameter[i] -= rate * (gradient[i] + l2 * parameter[i] + decay * parameter[i])


@compiled
def descend_with_momentum(parameter, gradient, velocity, rate, momentum, decay, l2):
    """The same with heavy-ball momentum, `velocity = momentum velocity + gradient`."""
    for i in range(len(parameter)):
        velocity[i] = momentum * velocity[i] + gradient[i] + l2 * parameter[i]
        parameter[i] -= rate * (velocity[i] + decay * parameter[i])


@compiled
def average(mean, parameter, share):
    """`mean += share (parameter - mean)`, in place."""
    for i in range(len(mean)):
        mean[i] += share * (parameter[i] - mean[i])
