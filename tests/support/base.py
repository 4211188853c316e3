"""The tiny pretrained base, assembled once into the cache.

python -m tests.support.base   assemble it, print its path
"""

from .host import CACHE

NAME = "graft_tiny.safetensors"


def get_tiny_base():
    """Return the path of the assembled checkpoint; assemble it if it is missing or its weights have changed."""
    from tests.toy.assemble import assemble

    return assemble(CACHE / NAME)


if __name__ == "__main__":
    print(get_tiny_base())
