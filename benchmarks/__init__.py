"""One question a file, one table each: `python -m benchmarks.NAME`; figures in results/, words in LOG.md."""
