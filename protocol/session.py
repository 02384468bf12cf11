"""The conversation of an agent and a backend, without I/O: both ends use it.

Feed a session what arrived and what time it is; drain what it wants sent and what it has to
say. It opens no socket, reads no clock and stores nothing: records are read from the
journal, and committed to the store, by the shell around it.
"""

from protocol.session_agent import AgentSession
from protocol.session_base import (
    FRAME_HEAD,
    FRAME_TARGET,
    SILENCE,
    WELCOME_WITHIN,
    Acked,
    AgentNews,
    Apply,
    Buried,
    Closing,
    Dropped,
    Greeted,
    HubNews,
    Key,
    Left,
    Opened,
    Welcomed,
)
from protocol.session_hub import HubSession

__all__ = [
    "FRAME_HEAD",
    "FRAME_TARGET",
    "SILENCE",
    "WELCOME_WITHIN",
    "Acked",
    "AgentNews",
    "AgentSession",
    "Apply",
    "Buried",
    "Closing",
    "Dropped",
    "Greeted",
    "HubNews",
    "HubSession",
    "Key",
    "Left",
    "Opened",
    "Welcomed",
]
