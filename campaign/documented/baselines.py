"""The baselines of the documented runs: plain dictionaries of equal size, on the same tokens."""

from .documented_run import Documented

RUNS = {
    "relu": Documented("ReLU + L1 (run 0 of every log)"),
    "topk": Documented("TopK", sae={"activation": "topk"}),
    "batchtopk": Documented("BatchTopK", sae={"activation": "batchtopk"}),
    # static slicing: a token uses a quarter of the dictionary, that of its range of positions, or a random one
    "slices": Documented("static slices", sae={"mask": {"kind": "ranges", "ranges": 4}}),
    "random_slices": Documented("random slices", sae={"mask": {"kind": "random", "fraction": 0.25}}),
}
