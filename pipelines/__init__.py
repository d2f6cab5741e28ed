"""Shards -> clips: packing, indexing, order, ranged reads, decoding, batches. Knows nothing of training."""
