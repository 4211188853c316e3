"""Code shared by the tests and the demo: the host, the server, the browser, the pack as ComfyUI loads it."""
