"""Optimizers, what engines may cut them into, and the schedules: pure functions of progress."""
