from .bits_back import CodingChain as CodingChain, CodingError as CodingError, Stack as Stack
from .chains import bound as bound, coding_scheduler as coding_scheduler, fit_chain as fit_chain
from .files import (
    Encoded as Encoded,
    batch_sizes as batch_sizes,
    compress as compress,
    decompress as decompress,
    model_hash as model_hash,
    read_file as read_file,
    read_header as read_header,
)
from .images import (
    Decoded as Decoded,
    check_levels as check_levels,
    counted as counted,
    read_images as read_images,
    write_images as write_images,
)
from .limits import LARGEST_BATCH as LARGEST_BATCH, MAX_BATCH as MAX_BATCH
