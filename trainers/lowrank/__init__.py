"""Layers with a low-rank adapter, computed in few operations."""

# Start of the names of the parameters that hold a quantized layer's weight.
PART = "quantized_"
