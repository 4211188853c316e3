"""What training is: data, objective, method, loop, run and formats; nothing here knows ComfyUI."""
