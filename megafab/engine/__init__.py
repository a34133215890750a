"""Engines drive Megatron-core's schedules; the loop sees only the protocol in base."""
