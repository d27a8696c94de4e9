"""Numbers in the settings and reports of parts."""

import math
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

Weight = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def plain(value: Tensor) -> Any:
    """A number, or a list of numbers, with six digits. None if not finite, which JSON cannot hold."""
    numbers = value.detach().double().flatten().tolist()
    rounded = [float(f"{number:.6g}") if math.isfinite(number) else None for number in numbers]
    return rounded if value.ndim else rounded[0]
