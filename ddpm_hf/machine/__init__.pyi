from .cuda_graphs import Recorded as Recorded
from .distributed import (
    PRECISIONS as PRECISIONS,
    agree_to_stop as agree_to_stop,
    join_processes as join_processes,
    leave_processes as leave_processes,
)
from .files import TEMPORARY as TEMPORARY, fsync as fsync, put_in_place as put_in_place, replaced as replaced
from .memory import return_freed_memory as return_freed_memory
from .named import is_module_and_name as is_module_and_name, object_named as object_named
from .signals import (
    Stopped as Stopped,
    StopSignals as StopSignals,
    end_at_once_on_signals as end_at_once_on_signals,
    hear_again as hear_again,
    postponed as postponed,
)
