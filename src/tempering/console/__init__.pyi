from .notebook import widget as widget

__all__ = ["widget"]
