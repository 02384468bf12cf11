"""The benchmark suite: `python -m tests.bench`. No test fails because of a figure."""
