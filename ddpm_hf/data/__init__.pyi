from .cache import first_of as first_of
from .decoding import FORMATS as FORMATS, BadImage as BadImage, decode_image as decode_image
from .folders import image_files as image_files
from .samples import (
    BUILT_IN as BUILT_IN,
    Samples as Samples,
    digits_labels as digits_labels,
    fingerprint as fingerprint,
    is_image_folder as is_image_folder,
    to_model_range as to_model_range,
)
from .source import printable as printable
from .sources import (
    default_cache_dir as default_cache_dir,
    load_samples as load_samples,
    real_samples as real_samples,
)
