"""Stage 4: what generated networks are worth, against those they were learned from and against what costs nothing."""

from .baselines import Baseline
from .stage import evaluate, run_evaluate


__all__ = ["Baseline", "evaluate", "run_evaluate"]
