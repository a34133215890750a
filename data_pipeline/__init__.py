"""Offline: raw text to tokenized, split, indexed shards. Never imported by megafab."""
