"""Every row is looked at before it is trained on, and what is wrong with one is said with its number."""

from typing import Any

import msgspec

from agent.trainer import formats, templates
from agent.trainer.errors import TrainerError
from agent.trainer.readers import Row, unreadable
from agent.trainer.turns import BadRow
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat

LISTED = 32
"""Bad rows that are looked for before giving up."""
SHAPES = 4096
"""Different sequences of roles that are rendered once each, to find the row a template cannot take."""
_END = {"role": "|", "content": ""}


class NoRows(TrainerError):
    """A data set that has no row, or none that holds anything."""


class Checker:
    """Turns read rows into canonical ones, and remembers what was wrong with which."""

    def __init__(self, source: str, wanted: DataFormat, tokenizer: Any, pairs: bool) -> None:
        self.format = wanted
        self.dropped: set[str] = set()
        self.empty: list[int] = []
        self.seen = 0
        self._source = source
        self._told = wanted is not DataFormat.AUTO
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._chat = bool(templates.template_of(tokenizer))
        self._shapes: set[tuple[str, ...]] = set()
        self._columns: tuple[str, ...] = ()
        self._first: Row | None = None
        self._bad: list[tuple[Row, str]] = []

    def check(self, row: Row) -> dict[str, Any] | None:
        """Return the canonical form of ``row``, or None if it is left out."""
        self.seen += 1
        try:
            value = self._canonical(row)
        except BadRow as exc:
            self._bad.append((row, str(exc)))
            if len(self._bad) >= LISTED:
                self._raise_bad()
            return None
        if self.format is DataFormat.TEXT and not value["text"].strip():
            self.empty.append(row.number)
            return None
        return value

    def check_now(self, row: Row) -> dict[str, Any] | None:
        """Do as `check` does, but raise at the first row that is bad."""
        value = self.check(row)
        if self._bad:
            self._raise_bad()
        return value

    def finish(self, count: int) -> None:
        """Raise if any row was bad, or none is left."""
        if self._bad:
            self._raise_bad()
        if self.seen == 0:
            raise NoRows(FailureReason.DATA, f"{self._source}: the data set is empty: it has no rows.")
        if count == 0:
            raise NoRows(
                FailureReason.DATA, f"{self._source}: every one of its {self.seen} rows is empty text."
            )

    def _raise_bad(self) -> None:
        row, why = self._bad[0]
        numbers = [bad.number for bad, _ in self._bad]
        more = ""
        if len(numbers) > 1:
            count = f"at least {len(numbers)}" if len(numbers) >= LISTED else str(len(numbers))
            listed = ", ".join(map(str, numbers[:8])) + (" and on" if len(numbers) > 8 else "")
            more = f" ({count} rows are bad: {listed}.)"
        raise TrainerError(FailureReason.DATA, f"{self._source}, {row.where}: {why}{more}", rows=numbers)

    def _canonical(self, row: Row) -> dict[str, Any]:
        if not isinstance(row.value, dict):
            raise BadRow(f"it is not an object with columns. Accepted are {formats.SHAPES}.")
        self._settle(row)
        value = formats.canonical(row.value, self.format, self._chat)
        self.dropped |= row.value.keys() - formats.USED[self.format]
        columns = tuple(
            f"{name} ({'turns' if isinstance(value[name], list) else 'text'})"
            for name in value
            if name != "tools"
        )
        self._columns = self._columns or columns
        if columns != self._columns:
            raise BadRow(
                f"it becomes {' and '.join(columns)}, but the rows before become {' and '.join(self._columns)}."
            )
        self._check_text(value)
        self._check_render(value)
        return value

    def _settle(self, row: Row) -> None:
        """Choose the format by the first row, and hold every other row to it."""
        if self._told:
            if not formats.has_columns(row.value, self.format):
                raise BadRow(formats.wrong_columns(row.value, self.format))
        elif self._first is None:
            form = formats.detect(row.value, self._pairs)
            if form is None:
                why = formats.wrong_columns(row.value, pairs=self._pairs)
                raise unreadable(self._source, why, row=row.number)
            self.format, self._first = form, row
        elif not formats.has_columns(row.value, self.format):
            other = formats.detect(row.value, self._pairs)
            found = ", ".join(sorted(map(str, row.value))) or "none"
            raise BadRow(
                f"it is {other or 'of no known shape'} (columns: {found}), but {self._first.where} is "
                f"{self.format}. A data set has one format: convert the odd rows, or remove them."
            )
        if self._told and self._first is None:
            self._first = row
        if self.format in (DataFormat.MESSAGES, DataFormat.SHAREGPT) and not self._chat:
            templates.require_template(self._tokenizer, self._source, str(self.format))

    def _check_text(self, value: dict[str, Any]) -> None:
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError as exc:
            raise BadRow("its text is not valid UTF-8 (a broken character). Save the file as UTF-8.") from exc

    def _check_render(self, value: dict[str, Any]) -> None:
        """Render the first row of each sequence of roles: templates refuse by sequence, not by content."""
        conversations = templates.conversations_of(value)
        if not conversations or len(self._shapes) >= SHAPES:
            return
        shape = tuple(
            "+".join([turn["role"], *list(turn)[2:]]) for turns in conversations for turn in [*turns, _END]
        )
        shape += ("tools",) if "tools" in value else ()
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        if why := templates.render_failure(self._tokenizer, value):
            self._shapes.discard(shape)
            raise BadRow(why)
