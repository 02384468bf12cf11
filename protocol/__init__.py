"""The contract between agent, trainer and backend. Standard library and msgspec only."""
