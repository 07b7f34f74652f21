"""The benchmarks: their files, their expressions, their masks."""
