"""The tables of the hub's database."""

SCHEMA_VERSION = 1

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL, prefix TEXT NOT NULL, created_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS agents (id TEXT PRIMARY KEY, doc BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    agent_id TEXT,
    status TEXT NOT NULL,
    live INTEGER NOT NULL,
    doc BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_live ON jobs (live, agent_id);
-- How far each stream is durable: epoch, scope and lane name it for ever.
CREATE TABLE IF NOT EXISTS streams (
    agent_id TEXT NOT NULL, epoch INTEGER NOT NULL, scope TEXT NOT NULL, lane INTEGER NOT NULL,
    acked INTEGER NOT NULL,
    PRIMARY KEY (agent_id, epoch, scope, lane)
) WITHOUT ROWID;
-- Names of the values of points. Points that came by REST have epoch -1 and no schema_id.
CREATE TABLE IF NOT EXISTS shapes (
    id INTEGER PRIMARY KEY, job TEXT NOT NULL, epoch INTEGER NOT NULL, schema_id INTEGER NOT NULL,
    names TEXT,
    UNIQUE (job, epoch, schema_id)
);
-- part is a checksum of the record: the same point twice is one row, a train and an evaluation point
-- of one step are two. Nothing is ever replaced.
CREATE TABLE IF NOT EXISTS points (
    job INTEGER NOT NULL, step INTEGER NOT NULL, attempt INTEGER NOT NULL, part INTEGER NOT NULL,
    shape INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (job, step, attempt, part)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS logs (
    job TEXT NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL, attempt INTEGER NOT NULL,
    lines BLOB NOT NULL,
    PRIMARY KEY (job, first)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    job TEXT NOT NULL, attempt INTEGER NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (job, attempt, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commands (
    id TEXT PRIMARY KEY, agent_id TEXT NOT NULL, job TEXT NOT NULL, kind TEXT NOT NULL,
    created_at REAL NOT NULL, body BLOB NOT NULL, status TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS datasets (
    id TEXT PRIMARY KEY, storage_path TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
    sha256 TEXT NOT NULL, size INTEGER NOT NULL, created_at REAL NOT NULL
) WITHOUT ROWID;
PRAGMA user_version={SCHEMA_VERSION};
"""
