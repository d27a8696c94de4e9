"""Log D, multi-scale temporal SAEs for unlearning (`multiscale_conv`)."""

from .documented_run import Documented, parts

ROWS = {"mode": "sequences"}

RUNS = {
    "D1": Documented("dilated convolutions", sae={"parts": parts("dilated_conv")}, stream=ROWS),
    "D2": Documented(
        "refined",
        sae={"parts": parts(("dilated_conv", {"dilations": [1, 2]}), "decoder_separation", "feature_norm")},
        stream=ROWS,
    ),
    "D3": Documented("disentangled", sae={"parts": parts("feature_dropout"), "l1_coefficient": 0.1}),
    "D4": Documented(
        "planned next",
        sae={"parts": parts("batch_norm", "winner_takes_all", "decoder_orthogonality")},
        train={"tokens": 1_000_000},
    ),
}
