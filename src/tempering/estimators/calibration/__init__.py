"""Calibration of classifiers: the temperature of their logits, and how well it is known."""
