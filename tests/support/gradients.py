"""Measured errors of gradients."""

from graft_pack.trainers.engine.gradient_check import gradients_of, slope_error, slope_of


def directional_error(loss, parameters, step=1e-2):
    """Compare autograd with a central difference along one direction; return (relative error, finite difference).

    Args:
        loss: returns the scalar loss; called once with and four times without gradients.
        step: length of the difference, see `slope_error`.
    """
    slope, directions = slope_of(parameters, gradients_of(loss(), parameters))
    return slope_error(loss, parameters, slope, directions, step)
