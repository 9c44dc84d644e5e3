from .bits_back import CodingChain as CodingChain, CodingError as CodingError, Stack as Stack
from .files import (
    Encoded as Encoded,
    batch_sizes as batch_sizes,
    bound as bound,
    coding_scheduler as coding_scheduler,
    compress as compress,
    decompress as decompress,
    fit_chain as fit_chain,
    model_hash as model_hash,
    read_file as read_file,
    read_header as read_header,
)
from .images import (
    Decoded as Decoded,
    check_levels as check_levels,
    read_images as read_images,
    write_images as write_images,
)
