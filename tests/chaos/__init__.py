"""The chaos suite: `python -m tests.chaos`. Real trainers, killed and their checkpoints damaged, must end as if untouched."""
