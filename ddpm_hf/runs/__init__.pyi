from .batches import Batch as Batch, KeyedBatches as KeyedBatches, prefetched as prefetched, share_of as share_of
from .checkpoints import MANIFEST as MANIFEST, CheckpointError as CheckpointError, model_folder as model_folder
from .log import RunLog as RunLog
from .options import (
    FREE_TO_CHANGE as FREE_TO_CHANGE,
    TrainingOptions as TrainingOptions,
    averaging_lags as averaging_lags,
    check_names as check_names,
)
from .parsing import parse_options as parse_options, to_yaml as to_yaml
from .records import (
    RESULTS as RESULTS,
    environment as environment,
    on_one_line as on_one_line,
    public_options as public_options,
    read_json as read_json,
    read_metrics as read_metrics,
    read_options as read_options,
    read_results as read_results,
    shown_value as shown_value,
    weights_sha256 as weights_sha256,
    write_results as write_results,
)
from .report import write_report as write_report
from .state import TrainingState as TrainingState
