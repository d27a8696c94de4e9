"""Log D, multi-scale temporal SAEs for unlearning (`multiscale_conv`)."""

from .documented_run import Documented

ROWS = {"mode": "sequences"}
TWO = ("dilated_conv", {"dilations": [1, 2]})

RUNS = {
    "D1": Documented("dilated convolutions", ("dilated_conv",), stream=ROWS),
    "D2": Documented("refined", (TWO, "decoder_separation", "feature_norm"), stream=ROWS),
    "D3": Documented("disentangled", ("feature_dropout",), sae={"l1_coefficient": 0.1}),
    "D4": Documented(
        "planned next", ("batch_norm", "winner_takes_all", "decoder_orthogonality"), train={"tokens": 1_000_000}
    ),
}
