"""Text from models in this process: rows, scores, side by side."""
