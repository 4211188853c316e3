"""What the model is asked for: its own parameterisation, noise levels and loss."""
