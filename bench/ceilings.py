"""Print missing packages, versions and the rates of large copies and products: `python -m temposae.bench.ceilings [FILE]`.

FILE gets them as JSON.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "numpy", "pydantic", "typer", "rich", "yaml", "safetensors", "matplotlib", "transformer_lens",
    "pytest", "sparsify", "sae_lens", "dictionary_learning",
)  # fmt: skip


def main() -> None:
    missing = [name for name in PACKAGES if not find_spec(name)]
    print(f"missing: {', '.join(missing) or 'nothing'}", flush=True)
    import torch  # after that line, because these need some of the packages

    from ..engine.storage.files import write_json
    from .floors import copy_rate, matmul_rate
    from .results import about

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings: dict[str, Any] = about(device) | {"missing": missing}
    print(f"device: {ceilings['device']}; python {ceilings['versions']['python']}, torch {torch.__version__}")
    ceilings["copy_bytes_per_s"] = copy_rate(device)
    print(f"copy: {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s, read plus written", flush=True)
    ceilings["matmul_flops"] = matmul_rate(device, 2 if device == "cuda" else 4)
    print(f"product: {ceilings['matmul_flops'] / 1e12:,.2f} TFLOP/s", flush=True)
    write_json(Path(sys.argv[1]) if sys.argv[1:] else None, ceilings)


if __name__ == "__main__":
    main()
