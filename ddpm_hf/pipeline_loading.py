"""The shipped pipeline with what it needs where this package is installed: careful loading, and a card when it leaves.

The code that a checkpoint carries is loaded by diffusers, which asks `trust_remote_code` for it; nothing of this file
is needed there.
"""

import contextvars
import re
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from . import pipeline_ddpm_paper as shipped
from .scheduler.scheduling_ddpm_paper import DDPMPaperScheduler
from .unet.unet_ddpm_paper import DDPMPaperMLP, DDPMPaperUNet, check_weights

INSTALLED: dict[str, Any] = {each.__name__: each for each in (DDPMPaperUNet, DDPMPaperMLP, DDPMPaperScheduler)}
STOCK_CARD = "This model card has been automatically generated"  # and says nothing
PLAIN_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
- diffusion
- arxiv:2006.11239
---

# {repo_id}

A DDPM ([Ho, Jain, Abbeel 2020](https://arxiv.org/abs/2006.11239)). With `ddpm_hf` installed,
`DDPMPaperPipeline.from_pretrained("{repo_id}")` loads it; with diffusers alone,
`DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)` runs the code in this repository. With a
`unet/own_….py` in it, both need `trust_remote_code=True`, or the network as `unet=`.
"""
_loading: contextvars.ContextVar[dict] = contextvars.ContextVar("arguments of from_pretrained")


class DDPMPaperPipeline(shipped.DDPMPaperPipeline):
    __doc__ = shipped.DDPMPaperPipeline.__doc__  # the same arguments

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "DDPMPaperPipeline":
        """As in diffusers, but weights in pickled `.bin` files are read only with `use_safetensors=False`."""
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        place = network_folder(args[0]) if args and "unet" not in kwargs else None
        if place is not None:
            check_weights(place.glob("*"), kwargs)
            how = f"DDPMPaperPipeline(UNet2DModel.from_pretrained({str(place)!r}), DDPMScheduler(…))"
            alone = f"{place} is a network without a scheduler: take it with the process that it was trained in, {how}"
            if not Path(args[0], cls.config_name).is_file():
                raise OSError(f"{args[0]} has no {cls.config_name}; {alone}")
            if place == Path(args[0]) and kwargs.get("variant"):  # which diffusers looks for in folders alone
                network: Any = INSTALLED.get(cls.load_config(place)["unet"][1], UNet2DModel)
                options = {k: kwargs[k] for k in ("variant", "use_safetensors", "dtype", "torch_dtype") if k in kwargs}
                kwargs |= {"unet": network.from_pretrained(place, **options), "variant": None}
        token = _loading.set(kwargs)
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            _loading.reset(token)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """The index without its reference to carried pipeline code: this class is the pipeline."""
        index: Any = None
        try:
            index = super()._dict_from_json_file(json_file)
        except RecursionError:
            pass
        if not isinstance(index, dict):
            raise ValueError(f"{json_file} is not the index of a pipeline")
        if index.get("_class_name") == ["pipeline", "DDPMPaperPipeline"]:
            index["_class_name"] = "DDPMPaperPipeline"
        return index

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The index with its components pointing at the installed classes. Raises ValueError for other libraries."""
        loaded = super().load_config(*args, **kwargs)
        index, arguments = loaded[0] if isinstance(loaded, tuple) else loaded, _loading.get({})
        for name in {"unet", "scheduler"} & index.keys():
            if not isinstance(index[name], list) or [type(part) for part in index[name]] != [str, str]:
                raise ValueError(f"model_index.json: {name} is {index[name]}; expected a library and a class")
            library, class_name = index[name]
            stem: Any = shipped.CARRIED.get(class_name)
            if library == stem:
                index[name] = [INSTALLED[class_name].__module__, class_name]
            known = library in (stem, "diffusers") and class_name != "ModelMixin"
            remedy = f"; pass {name}={'MyNetwork' if name == 'unet' else class_name}.from_pretrained(…)"
            if arguments.get(name) is not None and library != stem:  # of what the index names nothing is imported
                index[name], known = ["diffusers", "ModelMixin" if name == "unet" else "SchedulerMixin"], True
            elif re.fullmatch(r"own_\w+", library):
                known = arguments.get("trust_remote_code")
                remedy += f", or trust_remote_code=True, which runs {name}/{library}.py"
            if not known:
                found = f"model_index.json: {name} is {index[name]}; known are diffusers and {[*INSTALLED]}"
                raise ValueError(found + remedy)
        return loaded

    def _upload_folder(self, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As the shipped pipeline, with `PLAIN_CARD` in place of stock's card."""
        card = Path(working_dir, "README.md")
        if card.is_file() and STOCK_CARD in card.read_text(encoding="utf-8"):
            card.write_text(PLAIN_CARD.format(repo_id=repo_id), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)


def network_folder(folder: str | Path) -> Path | None:
    """Where a folder has its network, by the configuration beside it; None where it has none."""
    places = [Path(folder, name) for name in ("unet_ema", "unet", "")]
    return next((place for place in places if (place / "config.json").is_file()), None)
