"""The network: CLIP encoder, language model, SAM2 segmenter, memory bank, and Glus, which joins them."""
