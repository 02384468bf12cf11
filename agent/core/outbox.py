"""What goes to the backend, cut to what may travel, before it has a number."""

import zlib
from collections.abc import Callable, Iterable
from operator import itemgetter

import msgspec

from protocol.codec import BadMessage, decode_record, encode_record
from protocol.failures import failure
from protocol.fields import MAX_RECORD
from protocol.records import (
    AnyRecord,
    Checkpoint,
    CommandDone,
    JobFacts,
    JobStatus,
    LogChunk,
    Notice,
    ParametersApplied,
    Point,
    Result,
    Schema,
)
from protocol.worker import Metrics

PROSE = 32_768
"""Characters of one text; the contract's limit is twice that, for texts of more than one byte a character."""
LINES = 1024
WORD = 2_048
TRACEBACK = 12_000
LOG_LINE = 512
"""50 of these lines and the traceback are a failure's evidence: with four bytes a character they still fit."""
ROWS = 1_000
NAMES = 512
"""Values of a point; the contract's limit."""


def schema_of(names: Iterable[str]) -> Schema:
    """Return the schema of these names. Its id follows from them, so that it needs no counter on disk."""
    ordered = sorted(names)
    return Schema(zlib.crc32("\n".join(ordered).encode()), ordered)


class Points:
    """Metrics to points; each schema goes ahead of the first point that uses it, once per epoch of the stream."""

    def __init__(self) -> None:
        self._said: dict[str, set[int]] = {}
        self._known: dict[tuple[str, ...], tuple[Schema, Callable[[dict[str, float]], Iterable[float]]]] = {}

    def records(self, job_id: str, attempt: int, metrics: Metrics) -> list[AnyRecord]:
        """Return the records for one event: the point, and its schema where that is new."""
        names = tuple(metrics.values)
        known = self._known.get(names)
        if known is None:
            schema = schema_of(names)
            known = self._known[names] = (schema, _in_order(schema.names))
        schema, in_order = known
        point = Point(
            metrics.time,
            attempt,
            metrics.step,
            metrics.epoch,
            schema.schema_id,
            list(in_order(metrics.values)),
            metrics.trend,
        )
        said = self._said.setdefault(job_id, set())
        if schema.schema_id in said:
            return [point]
        said.add(schema.schema_id)
        return [schema, point]


def _in_order(names: list[str]) -> Callable[[dict[str, float]], Iterable[float]]:
    """Return what takes the values of ``names`` out of a dict; tens of thousands may be asked for in a second."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: [values[name] for name in names]


def cut(text: str, limit: int = PROSE) -> str:
    """Return ``text``, or its two ends where it is too long to travel."""
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


def admit(record: AnyRecord) -> bytes:
    """Return the record as it is stored: its texts cut to fit a frame, and sure to be read at the other end.

    What cannot be made so, since a trainer said something outlandish, becomes a notice that says it.
    """
    if isinstance(record, Point) and len(record.values) <= NAMES and len(record.trend) <= 64:
        # Most of all records by far, made of numbers alone: what could not be read back is a name, and those
        # are in the schema.
        return encode_record(record)
    try:
        body = encode_record(_bounded(record))
        if len(body) <= MAX_RECORD:
            decode_record(body)
            return body
        why = f"{len(body)} bytes, and {MAX_RECORD} may travel"
    except (ValueError, OverflowError) as error:
        why = cut(str(error), WORD)
    if isinstance(record, JobStatus):
        # Whatever else is lost, the state arrives.
        return encode_record(_bare(record))
    text = f"A report of the kind {type(record).__name__} could not be sent: {why}."
    attempt = getattr(record, "attempt", 0)
    return encode_record(Notice(getattr(record, "time", 0.0), "warning", _plain(text), attempt))


def lean(body: bytes, fits: Callable[[bytes], bool]) -> bytes | None:
    """Return a state, or the answer to a command, without what explains it; None for what cannot be made to fit.

    A backend may take frames far smaller than the contract's largest, and must hear how a job ended.
    """
    try:
        record = decode_record(body)
    except BadMessage:
        return None
    for limit in (WORD, WORD // 8):
        match record:
            case JobStatus():
                less = encode_record(_bare(record, limit))
            case CommandDone(detail=detail):
                less = encode_record(msgspec.structs.replace(record, detail=_plain(detail, limit)))
            case _:
                return None
        if fits(less):
            return less
    return None


def _plain(text: str, limit: int = WORD) -> str:
    return cut(text, limit).encode("utf-8", "replace").decode()


def _bare(status: JobStatus, limit: int = WORD) -> JobStatus:
    cause = status.failure and failure(status.failure.reason, _plain(status.failure.sentence, limit))
    return msgspec.structs.replace(status, detail=_plain(status.detail, limit), failure=cause)


def _bounded(record: AnyRecord) -> AnyRecord:
    match record:
        case JobStatus(failure=cause) if cause is not None and cause.evidence is not None:
            seen = cause.evidence
            evidence = msgspec.structs.replace(
                seen,
                traceback=cut(seen.traceback, TRACEBACK),
                log_tail=[cut(line, LOG_LINE) for line in seen.log_tail[-50:]],
                rows=seen.rows[:ROWS],
            )
            cause = msgspec.structs.replace(cause, sentence=cut(cause.sentence, WORD), evidence=evidence)
            return msgspec.structs.replace(record, detail=cut(record.detail, WORD), failure=cause)
        case JobStatus(detail=detail, failure=cause):
            if cause is not None and len(cause.sentence) > WORD:
                cause = msgspec.structs.replace(cause, sentence=cut(cause.sentence, WORD))
            return msgspec.structs.replace(record, detail=cut(detail, WORD), failure=cause)
        case Notice(text=text):
            return msgspec.structs.replace(record, text=cut(text, WORD)) if len(text) > WORD else record
        case Checkpoint(name=name):
            return msgspec.structs.replace(record, name=cut(name, WORD))
        case ParametersApplied(refused=refused):
            return msgspec.structs.replace(record, refused=cut(refused, WORD))
        case CommandDone(detail=detail):
            return msgspec.structs.replace(record, detail=cut(detail, WORD))
        case JobFacts(facts=facts):
            # Names of at most 256 characters and values of a few thousand, 64 of them: the contract's own limits.
            kept_facts = {cut(name, 200): cut(value, WORD) for name, value in list(facts.items())[:48]}
            return msgspec.structs.replace(record, facts=kept_facts)
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


def chunks(chunk: LogChunk, limit: int = 40_000) -> list[LogChunk]:
    """Return a chunk of log as records of at most ``limit`` characters, in order.

    Each says the byte where it begins, as far as the lines are still those of the file.
    """
    parts: list[LogChunk] = []
    lines: list[str] = []
    size = 0
    offset = after = chunk.offset

    def close() -> None:
        dropped = 0 if parts else chunk.dropped
        parts.append(msgspec.structs.replace(chunk, lines=lines, offset=offset, dropped=dropped))

    for line in chunk.lines:
        shown = cut(line, PROSE)
        if lines and (size + len(shown) > limit or len(lines) >= LINES):
            close()
            lines, size, offset = [], 0, after
        lines.append(shown)
        size += len(shown) + 1
        after += len(line.encode("utf-8", "replace")) + 1
    if lines or not parts:
        close()
    return parts
