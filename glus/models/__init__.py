"""The network: an MLLM, a segmenter, the memory bank, and Glus, which joins them."""
