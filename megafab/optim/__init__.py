"""Optimizer settings and the schedules: pure functions of progress."""
