"""What the tests and the demo share: the host, the server, the browser, the pack as ComfyUI loads it."""
