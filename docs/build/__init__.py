"""Scripts that write generated files: locales, workflows, the blueprint, tables and all pictures of the documentation.

Run them as `python -m docs.build.NAME`; most drive the tests' ComfyUI server and browser.
"""

# tests sets how OpenMP's threads wait, which must happen before torch is imported.
import tests  # noqa: F401
