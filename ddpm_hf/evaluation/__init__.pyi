from .errors import (
    frechet_distance_error as frechet_distance_error,
    kernel_distance_error as kernel_distance_error,
)
from .evaluator import Evaluator as Evaluator
from .frechet import frechet_distance as frechet_distance
from .metrics import (
    inception_score as inception_score,
    kernel_distance as kernel_distance,
    load_extractor as load_extractor,
)
from .protocol import METRICS as METRICS, Protocol as Protocol
