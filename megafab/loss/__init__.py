"""Vocabulary-parallel cross-entropy and the ledger that adds losses up."""
