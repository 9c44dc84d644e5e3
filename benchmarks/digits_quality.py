"""Are the digits digits?  python benchmarks/digits_quality.py CHECKPOINT [--fast float32|bfloat16]

Two numbers about 256 samples of a model trained on scikit-learn's digits:

- confidence: the share of samples about which a classifier is more than 0.9 sure. The classifier (an RBF support
  vector machine with calibrated probabilities) is trained on half of all real digits; its accuracy on the other half,
  and the share of that half it is sure of, are printed beside.
- Fréchet distance between Gaussians fitted to the first 20 principal components: of 256 samples to the real digits,
  and of 256 real digits to the other real digits, as the mean of 20 seeded draws. A model that draws from the true
  distribution scores about the latter, so their ratio is printed. Components are fitted to all real digits.

Exits with 1 when confidence is below 0.65 or the ratio above 1.5. Needs the extra `train`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.inference import speed_up

NUM_SAMPLES, NUM_COMPONENTS, NUM_DRAWS, SURE = 256, 20, 20, 0.9
MIN_CONFIDENT, MAX_RATIO = 0.65, 1.5


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of Gaussians fitted to the rows of a and b (Heusel et al. 2017)."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def drawn(checkpoint: str, steps: int | None, fast: str | None = None) -> np.ndarray:
    """Samples of the seeds 0 … 255 on the data's scale 0 … 16, [256, 64]; `fast`: sped up, in this precision."""
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    if torch.cuda.is_available():
        pipe.to("cuda")
    if fast is not None:
        pipe = speed_up(pipe, getattr(torch, fast))
    images = pipe(seeds=range(NUM_SAMPLES), num_inference_steps=steps, output_type="np").images
    return images.reshape(NUM_SAMPLES, -1) * 16


def quality(samples: np.ndarray) -> dict[str, float]:
    """Both measures of samples [N, 64] on the scale 0 … 16, and what real digits score."""
    real, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(real))
    half, rest = np.split(order, [len(real) // 2])
    classifier = CalibratedClassifierCV(SVC(gamma=0.001), ensemble=False).fit(real[half], labels[half])
    probability, real_probability = classifier.predict_proba(samples), classifier.predict_proba(real[rest])

    pca = PCA(NUM_COMPONENTS, random_state=0).fit(real)
    projected = pca.transform(real)
    between_real = []
    for _ in range(NUM_DRAWS):
        draw = rng.permutation(len(real))
        between_real.append(frechet_distance(projected[draw[: len(samples)]], projected[draw[len(samples) :]]))
    distance = frechet_distance(pca.transform(samples), projected)
    return {
        "confident": float((probability.max(1) > SURE).mean()),
        "confident_real": float((real_probability.max(1) > SURE).mean()),
        "classifier_accuracy": float((real_probability.argmax(1) == labels[rest]).mean()),
        "digits_seen": int(len(set(probability.argmax(1)[probability.max(1) > SURE]))),
        "frechet_distance": distance,
        "frechet_distance_real": float(np.mean(between_real)),
        "frechet_ratio": distance / float(np.mean(between_real)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, help="reverse steps; default: all")
    parser.add_argument("--fast", choices=("float32", "bfloat16"), help="sample with ddpm_hf.inference.speed_up")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    numbers = quality(drawn(args.checkpoint, args.steps, args.fast))
    for name, value in numbers.items():
        print(f"{name:24} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if numbers["confident"] < MIN_CONFIDENT or numbers["frechet_ratio"] > MAX_RATIO:
        sys.exit(f"below the target: confident >= {MIN_CONFIDENT}, frechet_ratio <= {MAX_RATIO}")


if __name__ == "__main__":
    main()
