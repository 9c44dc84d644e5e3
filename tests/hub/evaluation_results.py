"""Results as `ddpm-hf evaluate` writes them, for cards."""

import copy
from typing import Any

from ddpm_hf.runs import weights_sha256

RESULTS: list[dict[str, Any]] = [
    {
        "metric": "bpd",
        "name": "bits/dim",
        "value": 2.931234,
        "spread": 0.01234567,
        "parts": {"prior_bpd": 1e-5, "kl_bpd": 2.9, "decoder_bpd": 0.031224},
        "rate_distortion": {"num_reverse_steps": [1, 2], "rate_bpd": [0.1, 2.9], "rmse": [60.0, 5.0]},
        "protocol": {"num_images": 1797, "seed": 0, "num_levels": 17, "num_timesteps_subset": 20},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 10},
        "data": {"name": "digits", "split": "test", "fingerprint": "cd34"},
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
    {
        "metric": "fid",
        "name": "FID-5k",
        "value": 54.32109876,
        "spread": None,
        "protocol": {"extractor": "tiny", "seeds": "0-4999", "num_reference": 1437, "num_samples": 5000},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 50},
        "data": {"name": "digits", "split": "train", "fingerprint": "cd34"},
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
    {
        "metric": "is",
        "name": "IS-5k",
        "value": 7.7,
        "spread": 0.125,
        "protocol": {"extractor": "tiny", "seeds": "0-4999", "num_samples": 5000},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 50},
        "data": None,
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
]


def measured_on(unet: Any) -> list[dict[str, Any]]:
    """RESULTS as if of this network's weights."""
    results = copy.deepcopy(RESULTS)
    for result in results:
        result["model"]["weights_sha256"] = weights_sha256(unet.state_dict())
    return results
