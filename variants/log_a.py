"""Log A, structured positional masking (`masking`)."""

from .documented import Documented

RUNS = {
    "A1": Documented("hard masks", sae={"mask": {"kind": "random", "fraction": 0.5}}),
    "A2": Documented("soft masks", sae={"mask": {"kind": "soft"}}),
    "A3": Documented("soft masks, strong sparsity", sae={"mask": {"kind": "soft"}, "l1_coefficient": 0.2}),
}
