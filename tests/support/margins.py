"""Record of the margins of numeric checks: `pytest --margins`, without `-n`.

A check is a comparison with a bound of a hundredth or less, a `pytest.approx` or an `allclose`. Each line's worst case
counts. Kernels differ between CPUs, so run it with and without ATEN_CPU_CAPABILITY=default, with one thread and two.
"""

import ast
import operator
import os
import sys

import numpy as np
import pytest
import torch
from _pytest.assertion import rewrite

ENOUGH = 5.0
# Bounds above are about behavior, not about rounding.
LARGEST = 1e-2
NAME = "__graft_compare__"


class Margins:
    """A plugin that keeps each line's worst (fraction of the bound, test)."""

    def __init__(self):
        self._worst = {}
        _rewrite_comparisons(self)
        _watch_approx(self)
        torch.allclose = self._watched(torch.allclose, lambda value: value.detach().double().numpy())
        np.allclose = self._watched(np.allclose, lambda value: np.asarray(value, dtype=float))

    def note(self, line, share):
        """Keep a fraction of a bound if it is the line's largest so far."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
        if line not in self._worst or share > self._worst[line][0]:
            self._worst[line] = share, test

    def compare(self, kind, value, bound, line):
        """Compare as the test does; note floats below small bounds."""
        try:
            if isinstance(bound, float) and 0 < bound <= LARGEST:
                self.note(line, float(torch.as_tensor(value).detach().max()) / bound)
        except (TypeError, RuntimeError):
            pass  # Not a number, so not a numeric check.
        return getattr(operator, kind)(value, bound)

    def _watched(self, allclose, to_numpy):
        def watched(a, b, rtol=1e-5, atol=1e-8, **more):
            one, other = np.broadcast_arrays(to_numpy(a), to_numpy(b))
            differs = one != other
            allowed = atol + rtol * np.abs(other[differs])
            self.note(_line_of_test(), float((np.abs(one - other)[differs] / allowed).max(initial=0.0)))
            return allclose(a, b, rtol=rtol, atol=atol, **more)

        return watched

    def pytest_terminal_summary(self, terminalreporter):
        """List the checks whose margin is less than five, the closest first."""
        # A fraction above one checks a difference, or is a failure that is reported as such.
        found = [(share, line, test) for line, (share, test) in self._worst.items() if 1 >= share > 1 / ENOUGH]
        terminalreporter.section(f"{len(found)} of {len(self._worst)} numeric checks have a margin below {ENOUGH:g}")
        for share, line, test in sorted(found, reverse=True):
            terminalreporter.write_line(f"{1 / share:8.2f}  {line}  {test}")


class _Comparisons(ast.NodeTransformer):
    def __init__(self, name):
        self._name = name

    def visit_Compare(self, node):
        self.generic_visit(node)
        kind = {ast.Lt: "lt", ast.LtE: "le"}.get(type(node.ops[0]))
        if len(node.ops) > 1 or kind is None:
            return node
        line = ast.Constant(f"{self._name}:{node.lineno}")
        values = [ast.Constant(kind), node.left, node.comparators[0], line]
        return ast.copy_location(ast.Call(ast.Name(NAME, ast.Load()), values, []), node)


def _rewrite_comparisons(margins):
    """Make pytest compare through `margins` in all asserts that it rewrites from now on, with a separate cache."""
    import builtins

    setattr(builtins, NAME, margins.compare)
    rewrite.PYC_TAIL = f"-margins{rewrite.PYC_TAIL}"
    rewrite_asserts = rewrite.rewrite_asserts

    def rewritten(module, source, path=None, config=None):
        for node in ast.walk(module):
            if isinstance(node, ast.Assert):
                node.test = _Comparisons(os.path.relpath(str(path))).visit(node.test)
        ast.fix_missing_locations(module)
        rewrite_asserts(module, source, path, config)

    rewrite.rewrite_asserts = rewritten


def _watch_approx(margins):
    scalar = type(pytest.approx(1.0))
    equal = scalar.__eq__

    def watched(self, actual):
        if isinstance(actual, float) and isinstance(self.expected, (int, float)):
            bound = self.tolerance
            if 0 < bound <= LARGEST * (abs(self.expected) or 1.0) and np.isfinite(actual):
                margins.note(_line_of_test(), abs(actual - self.expected) / bound)
        return equal(self, actual)

    scalar.__eq__ = watched


def _line_of_test():
    frame = sys._getframe(2)
    while frame and "/tests/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "?"
