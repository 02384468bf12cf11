"""The local API, and the names of the two files by which the command line finds it."""

TOKEN_FILE = "local_token"  # noqa: S105 - a file's name
"""In AGENT_HOME: the token that every call but the health check needs."""
ADDRESS_FILE = "local_api"
"""In AGENT_HOME while the API is up: its URL."""
