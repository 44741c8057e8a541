"""Benchmarks: one question a file, one table each."""
