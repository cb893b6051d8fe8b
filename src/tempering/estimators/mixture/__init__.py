"""Annealed mixtures: EM under a falling temperature."""
