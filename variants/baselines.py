"""What the documented runs are compared with: plain dictionaries of equal size, on the same tokens."""

from .documented import Documented

RUNS = {
    "relu": Documented("ReLU + L1 (run 0 of every log)"),
    "topk": Documented("TopK", sae={"activation": "topk"}),
    "batchtopk": Documented("BatchTopK", sae={"activation": "batchtopk"}),
}
