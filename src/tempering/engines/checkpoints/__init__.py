"""Checkpoints on disk with a profile folded in: safetensors and GGUF."""
