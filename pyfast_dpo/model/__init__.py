"""What is done to a transformers model: projections, which ways it can go, own layers, kept activations, memory."""
