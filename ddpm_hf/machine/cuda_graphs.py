"""CUDA graphs: a GPU's work is recorded once and then replayed, so that Python launches it with one call.

A training step of the CIFAR-10 network is more than a thousand kernels. Python takes longer to launch them one by one
than a fast GPU takes to run them, and so does a reverse step for a few images.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

NUM_WARM_UP = 3  # calls in which libraries choose their kernels and allocate what they keep


class Recorded:
    """`function(*tensors)`, recorded as a CUDA graph when it has run a few times, and replayed from then on.

    It computes the same bits, also of dropout: torch's global generator goes on as if nothing were recorded. The
    function returns a tensor or nothing, and gets tensors on `device`, a GPU, of the same shapes at every call. It
    must not wait for the GPU. What it changes, weights or gradients, it changes in place; they must not move in
    memory. What it does on the CPU is done in the first calls only. Several threads may call it.

    Raises ValueError for tensors of other shapes than the first ones.
    """

    def __init__(self, function: Callable[..., Tensor | None], device: torch.device):
        self.function, self.device = function, device
        self._lock = threading.Lock()
        self._num_calls = 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor | None:
        """A new tensor, as `function` returns it. `tensors` may be on the CPU too, best in pinned memory."""
        with self._lock, torch.cuda.device(self.device):
            self._take(tensors)
            self._num_calls += 1
            if self._num_calls <= NUM_WARM_UP:
                output = self._warm_up()
            else:
                if self._graph is None:
                    self._graph = self._record()
                self._graph.replay()
                output = self._output
            return None if output is None else output.clone()

    def _take(self, tensors: tuple[Tensor, ...]) -> None:
        """Put the values where a replay looks for them."""
        if not self._inputs:
            self._inputs = [x.to(self.device, copy=True) for x in tensors]
        elif [x.shape for x in tensors] != [x.shape for x in self._inputs]:
            shapes = [[tuple(x.shape) for x in some] for some in (tensors, self._inputs)]
            raise ValueError(f"this work was recorded for tensors of shapes {shapes[1]}, and is given {shapes[0]}")
        else:
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(given, non_blocking=True)

    def _warm_up(self) -> Tensor | None:
        """Run it on a stream of its own, as the recording will: autograd remembers where gradients first came from."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self.function(*self._inputs)
        current.wait_stream(self._stream)
        return output

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads pin memory meanwhile
            self._output = self.function(*self._inputs)
        return graph
