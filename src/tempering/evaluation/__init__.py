"""What tempering costs and buys: paired cost on text, diversity, budget, controls."""

from tempering.evaluation.compare import Comparison, compare
from tempering.evaluation.cost import Variant

__all__ = ["Comparison", "Variant", "compare"]
