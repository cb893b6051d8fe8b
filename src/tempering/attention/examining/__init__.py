"""What a forward pass shows of a model: its layers, their softmaxes, and whether they obey."""
