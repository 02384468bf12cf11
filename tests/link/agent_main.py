"""The real agent with a recording trainer, and with a record of what its journal was given to send.

The record is a table of the journal, written in the transaction that stores the record: stream, number, checksum.
"""

import hashlib
import sys

import anyio

from agent.runtime.journal_tables import Tx

TABLE = """CREATE TABLE IF NOT EXISTS link_said (
    epoch TEXT, scope TEXT, lane INTEGER, seq INTEGER, digest BLOB, PRIMARY KEY (epoch, scope, lane, seq)
) WITHOUT ROWID"""


def digest(body: bytes) -> bytes:
    """Return what stands for a record in both ends' tables."""
    return hashlib.blake2b(body, digest_size=8).digest()


def record() -> None:
    """Have the journal write down what is appended."""
    set_epoch, append_all = Tx.set_epoch, Tx.append_all

    def noted_epoch(self: Tx, epoch: int) -> None:
        self._db.execute(TABLE)
        set_epoch(self, epoch)

    def noted(self: Tx, scope: str, lane: int, bodies: list[bytes]) -> int:
        last = append_all(self, scope, lane, bodies)
        first = last - len(bodies) + 1
        epoch = f"{self.epoch():016x}"
        rows = [(epoch, scope, lane, first + at, digest(body)) for at, body in enumerate(bodies)]
        self._db.executemany("INSERT INTO link_said VALUES (?,?,?,?,?)", rows)
        return last

    Tx.set_epoch = noted_epoch  # type: ignore[method-assign]
    Tx.append_all = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    from agent.app import run_agent
    from agent.cli_start import log_to
    from agent.config import load_for_program

    record()
    settings = load_for_program()
    redactor = log_to(settings)
    sys.exit(anyio.run(lambda: run_agent(settings, module="tests.link.trainer", redactor=redactor)))
