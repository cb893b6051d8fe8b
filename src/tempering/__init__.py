"""tempering: temperature as the inference parameter that decides how many hypotheses stay alive.

The table of contents is `__init__.pyi`, for type checkers and for this module alike. Names load on
first use, so `import tempering` imports neither torch nor transformers, patches nothing and
downloads nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
