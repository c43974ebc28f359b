"""Scripts that measure what the README claims. Run them as `python -m benchmarks.<name>`."""
