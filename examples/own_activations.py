"""Train on activations of your own, without a language model.

python examples/own_activations.py [ACTS.npy]
"""

import sys

import numpy as np
import temposae as ts


def activations(rows: int, positions: int = 32, d_in: int = 64, features: int = 256, active: int = 8) -> np.ndarray:
    """Make x [R, T, D]: each token is a sum of a few of `features` random directions."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((features, d_in), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chosen = generator.integers(features, size=(rows, positions, active))
    strengths = generator.uniform(1, 2, chosen.shape).astype(np.float32)
    return np.einsum("rta,rtad->rtd", strengths, directions[chosen])


def main(rows: int = 10_000, path: str | None = None) -> ts.Run:
    # An array [R, T, D] has positions 0 to T - 1 in each row; [M, D] has none. A memory map is read as it is needed.
    x = activations(rows) if path is None else np.load(path, mmap_mode="r")
    sae = ts.SAEConfig(d_in=x.shape[-1], d_sae=512, k=8, activation="batchtopk")
    run = ts.train(x, sae, ts.TrainConfig(tokens=x.size // x.shape[-1], batch=1024))
    print(run)
    # One row in twenty is held out. The control is a frozen random decoder with a trained encoder.
    for name, scores in (run.held_out or {}).items():
        print(name, scores)
    return run


if __name__ == "__main__":
    main(path=sys.argv[1] if len(sys.argv) > 1 else None)
