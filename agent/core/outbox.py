"""What goes to the backend, cut to what may travel, before it has a number."""

import zlib
from collections.abc import Iterable

import msgspec

from protocol.codec import encode_record
from protocol.messages import MAX_RECORD, AnyRecord, JobStatus, LogChunk, Notice, Point, Result, Schema
from protocol.worker import Metrics

PROSE = 32_768
"""Characters of one text; the contract's limit is twice that, for texts of more than one byte a character."""
LINES = 1024
WORD = 2_048


def schema_of(names: Iterable[str]) -> Schema:
    """Return the schema of these names. Its id follows from them, so that it needs no counter on disk."""
    ordered = sorted(names)
    return Schema(zlib.crc32("\n".join(ordered).encode()), ordered)


class Points:
    """Metrics to points; each schema goes ahead of the first point that uses it, once per epoch of the stream."""

    def __init__(self) -> None:
        self._said: set[tuple[str, int]] = set()
        self._known: dict[tuple[str, ...], Schema] = {}

    def records(self, job_id: str, attempt: int, metrics: Metrics) -> list[AnyRecord]:
        """Return the records for one event: the point, and its schema where that is new."""
        names = tuple(metrics.values)
        schema = self._known.get(names) or self._known.setdefault(names, schema_of(names))
        point = Point(
            metrics.time,
            attempt,
            metrics.step,
            metrics.epoch,
            schema.schema_id,
            [metrics.values[name] for name in schema.names],
            metrics.trend,
        )
        if (job_id, schema.schema_id) in self._said:
            return [point]
        self._said.add((job_id, schema.schema_id))
        return [schema, point]


def cut(text: str, limit: int = PROSE) -> str:
    """Return ``text``, or its two ends where it is too long to travel."""
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


def admit(record: AnyRecord) -> bytes:
    """Return the record as it is stored, with its texts cut so that it surely fits a frame."""
    body = encode_record(_bounded(record))
    if len(body) > MAX_RECORD:
        raise ValueError(f"a {type(record).__name__} record of {len(body)} bytes; the limit is {MAX_RECORD}")
    return body


def _bounded(record: AnyRecord) -> AnyRecord:
    match record:
        case JobStatus(failure=failure) if failure is not None and failure.evidence is not None:
            evidence = msgspec.structs.replace(
                failure.evidence,
                traceback=cut(failure.evidence.traceback),
                log_tail=[cut(line, WORD) for line in failure.evidence.log_tail[-50:]],
            )
            failure = msgspec.structs.replace(
                failure, sentence=cut(failure.sentence, WORD), evidence=evidence
            )
            return msgspec.structs.replace(record, detail=cut(record.detail, WORD), failure=failure)
        case JobStatus(detail=detail):
            return msgspec.structs.replace(record, detail=cut(detail, WORD)) if len(detail) > WORD else record
        case Notice(text=text):
            return msgspec.structs.replace(record, text=cut(text, WORD)) if len(text) > WORD else record
        case Result(samples=samples):
            kept = [
                {
                    name: cut(value, WORD) if isinstance(value, str) else value
                    for name, value in sample.items()
                }
                for sample in samples[:16]
            ]
            return msgspec.structs.replace(record, samples=kept)
        case _:
            return record


def chunks(chunk: LogChunk, limit: int = 48_000) -> list[LogChunk]:
    """Return a chunk of log as records of at most ``limit`` characters, in order."""
    parts: list[LogChunk] = []
    lines: list[str] = []
    size = 0
    for line in chunk.lines:
        line = cut(line, PROSE)
        if lines and (size + len(line) > limit or len(lines) >= LINES):
            parts.append(msgspec.structs.replace(chunk, lines=lines, dropped=0 if parts else chunk.dropped))
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines or not parts:
        parts.append(msgspec.structs.replace(chunk, lines=lines, dropped=0 if parts else chunk.dropped))
    return parts
