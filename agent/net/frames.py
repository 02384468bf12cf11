"""Frames as large as the backend takes them: by what WELCOME says, and by what it hung up at."""

from agent.core.outbox import lean
from protocol.codec import Codec
from protocol.fields import MAX_FRAME
from protocol.messages import Lane
from protocol.session import FRAME_HEAD, AgentSession, Key

HELLO_STREAMS = 1000
"""Streams that HELLO names: with their scopes they fit a frame."""
TOO_BIG = 1009
LEAST = 4096 - FRAME_HEAD
"""Bytes of records that every backend takes, by the contract, whatever it hangs up at."""


class Frames:
    """What is known of the backend's limit, over all connections.

    Something between may take less than WELCOME says, and then closes with 1009 at each dial. So frames become
    smaller with each such close; from the second in a row on, a record that would fill as large a frame as was
    refused is not sent again.
    """

    def __init__(self) -> None:
        self.hello_streams = HELLO_STREAMS
        self._batch = MAX_FRAME
        self._single = MAX_FRAME
        self._largest = 0
        self._refused = 0

    def __repr__(self) -> str:
        return f"<Frames of {self._batch}, records of {self._single}, {self._refused} refused in a row>"

    def begin(self) -> None:
        """Note a new connection."""
        self._largest = 0

    def sent(self, size: int) -> None:
        """Note the bytes of a frame."""
        self._largest = max(self._largest, size)

    def ended(self, code: int, welcomed: bool) -> None:
        """Learn from how a connection ended."""
        if code != TOO_BIG:
            self._refused = 0
            return
        self._refused += 1
        if not welcomed:
            self.hello_streams = max(1, self.hello_streams // 2)
            return
        # Whichever frame it was, the largest was too large.
        self._batch = max(LEAST, min(self._batch, self._largest // 2))
        if self._refused > 1:
            self._single = max(LEAST, min(self._single, self._largest - FRAME_HEAD))

    def queue(
        self,
        session: AgentSession,
        codec: Codec,
        key: Key,
        after: int,
        rows: list[tuple[int, bytes | None]],
    ) -> None:
        """Queue what was read, each frame within the limit, and a tombstone for whatever cannot be sent."""
        run: list[bytes] = []
        most = min(session.frame_room, self._single)
        room = min(most, self._batch)
        size = 0
        sent = after
        for seq, body in rows:
            length = codec.length(body) if body is not None else 0
            if body is not None and length > most and key.lane == Lane.CONTROL:
                # The state itself must arrive; what explains it stays here.
                body = lean(body, lambda less: codec.length(less) <= most) or body
                length = codec.length(body)
            if body is None or length > most or seq != sent + len(run) + 1 or size + length > room:
                session.send(key, sent + 1, run)
                sent, run, size = sent + len(run), [], 0
            if seq > sent + len(run) + 1:
                session.bury(key, sent + 1, seq - 1, "trimmed")
                sent = seq - 1
            if body is None or length > most:
                session.bury(key, seq, seq, "corrupt" if body is None else "oversize")
                sent = seq
                continue
            run.append(body)
            size += length
        session.send(key, sent + 1, run)
        if not rows:
            # Announced, but not in the journal any more: else this would be asked for again and again.
            session.bury(key, after + 1, session.last(key), "trimmed")
