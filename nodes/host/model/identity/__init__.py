"""Identity of weights: fingerprints of models, text encoders and VAEs."""
