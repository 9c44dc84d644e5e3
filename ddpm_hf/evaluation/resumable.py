"""Long work in numbered pieces, each of them a file: shared by processes; a piece that is there is not done again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..machine import replaced


class Pieces:
    """`count` pieces of some work under `work_dir`, in a folder of their own for each `identity`.

    `identity`, JSON, names all that decides the result: work of another identity is never mixed in. A piece's file
    appears by a rename once it is whole, so a run may be killed at any time; the same call later does the rest.
    """

    def __init__(self, work_dir: Path, kind: str, identity: Mapping[str, Any], count: int):
        text = json.dumps(identity, indent=2, sort_keys=True)
        self.folder = work_dir / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.count, self.text = count, text

    def path(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.safetensors"

    def is_done(self, number: int) -> bool:
        """Whether the piece's file is there, and as long as its header says."""
        try:
            with safe_open(self.path(number), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def complete(self, accelerator: Accelerator, compute: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Write the pieces that are missing, each process its share. Called by all processes, and waits for all.

        `compute(number)` gives a piece's tensors, the same in whichever process.
        """
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "identity.json").write_text(self.text + "\n", encoding="utf-8")
        accelerator.wait_for_everyone()
        missing = [i for i in range(self.count) if not self.is_done(i)]
        accelerator.wait_for_everyone()  # before the first of them appears: all must see the same list
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        quiet = not accelerator.is_main_process
        for number in tqdm(mine, desc=self.folder.name.rpartition("-")[0], unit="piece", disable=quiet or not mine):
            tensors = {name: x.cpu().contiguous() for name, x in compute(number).items()}
            own = self.path(number).with_suffix(f".{os.getpid()}.incomplete")  # another run may do the same piece
            with replaced(self.path(number), temporary=own) as temporary:
                save_file(tensors, temporary)
        accelerator.wait_for_everyone()

    def read(self, number: int) -> dict[str, Tensor]:
        return load_file(self.path(number))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """All pieces in order, one at a time in memory."""
        return (self.read(number) for number in range(self.count))
