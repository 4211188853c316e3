"""The training objective: parameterization, timesteps, noise, weighting and loss."""
