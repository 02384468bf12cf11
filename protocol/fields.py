"""Words and limits that frames and records share."""

from typing import Annotated, Literal

from msgspec import Meta

MAX_FRAME = 256 * 1024
"""Bytes of one frame, either way."""
MAX_RECORD = 192 * 1024
"""Bytes of one record in MessagePack; checked before it is given a number."""

Name = Annotated[str, Meta(max_length=256)]
Word = Annotated[str, Meta(max_length=4096)]
Prose = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0)]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = float | Literal["NaN", "Infinity", "-Infinity"]
"""A measured value. MessagePack carries non-finite floats as they are; JSON carries these three words."""
Values = Annotated[dict[Name, Number], Meta(max_length=512)]
