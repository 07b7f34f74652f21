"""Reading benchmarks: expressions, frames, masks, samples, batches."""
