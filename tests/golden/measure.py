"""How far one reverse step and the UNet are from what the paper's code computed.  python tests/golden/measure.py

The largest error over the largest entry, against the numbers of paper_reference.npz (README.md): for ours of every
recorded step, for stock's DDPMScheduler, which is given the recorded noise, of those with ε and a fixed variance. The
tests in tests/scheduler and tests/convert hold bounds for the same errors.
"""

from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperScheduler
from ddpm_hf.convert import from_tf_variables

PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("paper_reference.npz")) as file:
        return dict(file)


def pictures(values: np.ndarray) -> Tensor:
    """[..., H, W, C] as [..., C, H, W]."""
    return torch.from_numpy(values).movedim(-1, -3).contiguous()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def error_of_steps(golden: dict[str, np.ndarray], *, stock: bool) -> float:
    """The largest of all recorded reverse steps."""
    largest = 0.0
    for prediction, variance, clip in product(PREDICTION_TYPES, VARIANCE_TYPES, (False, True)):
        if stock and (prediction != "eps" or variance == "learned"):
            continue
        types = {"prediction_type": PREDICTION_TYPES[prediction], "variance_type": VARIANCE_TYPES[variance]}
        scheduler = (DDPMScheduler if stock else DDPMPaperScheduler)(**types, clip_sample=clip)
        output = pictures(golden[f"model_output/{prediction}"])
        if variance == "learned":
            output = torch.cat([output, pictures(golden["model_log_variance_learned"])], dim=1)
        x_t, noise = pictures(golden["in/x_t"]), pictures(golden["in/noise"])
        expected = pictures(golden[f"p/{prediction}/{variance}/clip{clip:d}/sample"])
        for i, t in enumerate(golden["in/t"].tolist()):
            one = slice(i, i + 1)
            given = {} if stock else {"variance_noise": noise[one]}
            with mock.patch(f"{DDPMScheduler.__module__}.randn_tensor", return_value=noise[one]):
                step = scheduler.step(output[one], t, x_t[one], **given)
            largest = max(largest, error(step.prev_sample, expected[one]))
    return largest


@torch.no_grad()
def error_of_unet(golden: dict[str, np.ndarray]) -> float:
    """Of its output, with the recorded weights, made again as README.md says."""
    rng, variables = np.random.RandomState(int(golden["unet/weight_seed"])), {}
    for name, sizes in zip(golden["unet/names"].tolist(), golden["unet/shapes"].tolist(), strict=True):
        shape = [int(size) for size in sizes.split()]
        weight = rng.randn(*shape) * (0.05 if len(shape) > 1 else 0.1) + (1.0 if name.endswith("gamma") else 0)
        variables[name.removeprefix("model/")] = weight.astype(np.float32)
    unet = from_tf_variables(variables, sample_size=16)
    output = unet(pictures(golden["unet/x"]), torch.from_numpy(golden["unet/t"])).sample
    return error(output, pictures(golden["unet/out"]))


def main() -> None:
    golden = recorded()
    print(f"a reverse step of ours          {error_of_steps(golden, stock=False):.0e}")
    print(f"a reverse step of stock's       {error_of_steps(golden, stock=True):.0e}")
    print(f"the UNet                        {error_of_unet(golden):.0e}")


if __name__ == "__main__":
    main()
