from .batches import (
    Batch as Batch,
    KeyedBatches as KeyedBatches,
    batches_of as batches_of,
    prefetched as prefetched,
    share_of as share_of,
)
from .checkpoints import MANIFEST as MANIFEST, CheckpointError as CheckpointError, model_folder as model_folder
from .distillation_options import (
    FREE_IN_DISTILLATION as FREE_IN_DISTILLATION,
    DistillationOptions as DistillationOptions,
    steps_of_stages as steps_of_stages,
)
from .dry_run import DryRun as DryRun
from .folder import RunFolder as RunFolder
from .held_out import (
    HeldOut as HeldOut,
    Part as Part,
    content_keys as content_keys,
    evaluate as evaluate,
    hold_out as hold_out,
    numbers_of as numbers_of,
)
from .log import RunLog as RunLog, start_trackers as start_trackers
from .networks import output_of as output_of
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
    evaluations as evaluations,
    grids_in as grids_in,
    lowest_bound as lowest_bound,
    on_one_line as on_one_line,
    options_beside as options_beside,
    public_options as public_options,
    read_json as read_json,
    read_metrics as read_metrics,
    read_options as read_options,
    read_results as read_results,
    relevant_options as relevant_options,
    shown_value as shown_value,
    some_names as some_names,
    weights_sha256 as weights_sha256,
    write_results as write_results,
)
from .report import write_report as write_report
from .scripts import finish as finish, launch as launch, prepare as prepare
from .setup import (
    build_network as build_network,
    build_scheduler as build_scheduler,
    free_to_change as free_to_change,
    in_force as in_force,
    initial_model as initial_model,
    load_data as load_data,
    make_accelerator as make_accelerator,
    resolved as resolved,
    run_manifest as run_manifest,
    training_state as training_state,
)
from .stages import (
    Stage as Stage,
    check_teacher as check_teacher,
    frozen as frozen,
    keep_student as keep_student,
    stages_of as stages_of,
    teacher_identity as teacher_identity,
    warn_if_stages_are_short as warn_if_stages_are_short,
)
from .state import TrainingState as TrainingState
from .updates import Updates as Updates, linear_warmup as linear_warmup
from .watching import (
    Watch as Watch,
    command_to_go_on as command_to_go_on,
    described as described,
    end_early as end_early,
    how_to_load as how_to_load,
    report_tables as report_tables,
    warn_if_averages_lag as warn_if_averages_lag,
    write_grids as write_grids,
)
