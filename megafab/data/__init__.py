"""Built shards to batches: format, order, mixture, packing, loader."""
