"""What keeps a run alive: signals, non-finite guards."""
