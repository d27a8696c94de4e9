"""Number ranges shared by several settings, and access to the sections of a file."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ..errors import UserError, shown

Count = Annotated[int, Field(ge=1, le=10**15)]
Latents = Annotated[int, Field(ge=1, lt=2**31)]  # a SparseCode's indices are int32
Positions = Annotated[int, Field(ge=1, le=2**20)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
Share = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


def section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of settings, empty if it is missing or null. Raises UserError if it is not a section."""
    values = settings.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{name}: {shown(values)} is not allowed; it must be a section of settings")
    return values
