"""What `sample` draws by, where it is not the checkpoint's network at its own size."""

from typing import Any

from ..convert import OnnxNetwork


def resize(pipe: Any, size: tuple[int, int]) -> None:
    """Let the network draw images of this height and width. Raises ValueError for points, and for what it cannot."""
    height, width = size
    if len(pipe.sample_shape) == 1:
        raise ValueError(f"--size {height}x{width}: the checkpoint is one of points")
    pipe.unet.register_to_config(sample_size=height if height == width else size)


def draw_by_onnx(pipe: Any, args: Any) -> None:
    """Put the network of an ONNX file in place of the pipeline's. Raises ValueError where it is not the same kind."""
    if args.fast or args.size is not None or args.dtype != "float32" or str(args.device) != "cpu":
        raise ValueError("--onnx draws on the CPU, in float32, at its own size; leave out --fast, --size and --dtype")
    network = OnnxNetwork(args.onnx)
    for name in ("in_channels", "out_channels", "sample_size", "num_class_embeds", "null_class"):
        theirs, ours = network.config.get(name), pipe.unet.config.get(name)
        if theirs != (list(ours) if isinstance(ours, tuple) else ours):
            raise ValueError(f"--onnx {args.onnx} has {name}={theirs}, {args.checkpoint} has {ours}")
    pipe.unet = network
