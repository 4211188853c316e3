"""Tests of the selection that `make quick` runs."""

from tests.support.collection import is_quick


def test_a_test_of_its_own_is_quick(request):
    assert is_quick(request.node)


def test_a_test_with_comfyui_is_not_quick(comfy, request):
    assert not is_quick(request.node)
