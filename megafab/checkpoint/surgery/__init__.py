"""Models that become others: a checkpoint in, a checkpoint of a larger model out."""
