"""Models that become others: a checkpoint in, a checkpoint of another model out."""
