from .cuda_graphs import Recorded as Recorded
from .distributed import join_processes as join_processes, leave_processes as leave_processes
from .signals import Stopped as Stopped, StopSignals as StopSignals
