"""The two versions: of the package, and of the wire."""

AGENT_VERSION = "1.0.0"
PROTOCOL_VERSION = 1
