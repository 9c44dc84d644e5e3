from .evaluator import Evaluator as Evaluator
from .metrics import (
    frechet_distance as frechet_distance,
    inception_score as inception_score,
    kernel_distance as kernel_distance,
    load_extractor as load_extractor,
)
from .protocol import METRICS as METRICS, Protocol as Protocol
