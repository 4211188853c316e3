"""Pytest collection: folders are plain folders, and a test module's name is `tests...`.

Without this, pytest takes the repository root, which has an `__init__.py`, for a package of tests. It then imports
the pack's ComfyUI entry point under the name of the checkout's folder, and names every module below it.
"""

import importlib
from collections import Counter, defaultdict

import pytest

from .host import ROOT

# Fixtures that need ComfyUI or a browser. All other fixtures that need one of them use one of these.
HOSTS = {"comfy", "tiny_base", "chromium"}
LEFT_OUT = ("browser", "server", "slow", "soak")


class NamedModule(pytest.Module):
    """A test module that is imported as `tests.folder.test_x`."""

    def _getobj(self):
        return importlib.import_module(".".join(self.path.relative_to(ROOT).with_suffix("").parts))


class Collection:
    """A plugin instead of conftest hooks, because it also concerns folders above the conftest."""

    @pytest.hookimpl
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        if config.getoption("--quick"):
            self._select(config, items, is_quick)
        if not config.getoption("--soak"):
            self._select(config, items, lambda item: not is_soak_only(item))
        self._sort(items)

    def _select(self, config, items, is_wanted):
        config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
        items[:] = filter(is_wanted, items)

    def _sort(self, items):
        """Put the slowest files first: one worker runs each file, and a slow file that starts last would end alone.

        First come files whose tests judge many pictures, then files with their own server, then files with most tests.
        """
        count = Counter(item.path for item in items)
        needs = defaultdict(set)
        for item in items:
            needs[item.path].update(item.fixturenames)

        def rank(item):
            return "sampler_steps" not in needs[item.path], "server" not in needs[item.path], -count[item.path]

        items.sort(key=rank)

    @pytest.hookimpl
    def pytest_pycollect_makemodule(self, module_path, parent):
        return NamedModule.from_parent(parent, path=module_path)


def is_soak_only(item):
    """Report whether a test, or a test with these parameters, runs in `make soak` alone."""
    marks = [mark.kwargs for mark in item.iter_markers("soak")]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return any(
        mark.get("only") or ("only_for" in mark and mark["only_for"].items() <= params.items()) for mark in marks
    )


def is_quick(item):
    """Report whether a test needs neither ComfyUI nor several processes, and is no long trial."""
    needs_comfy = HOSTS & set(item.fixturenames) or hasattr(item.function, "is_forked")
    return not needs_comfy and not any(item.get_closest_marker(name) for name in LEFT_OUT)
