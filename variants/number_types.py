"""Numbers in the settings of parts."""

from typing import Annotated

from pydantic import Field

Weight = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
