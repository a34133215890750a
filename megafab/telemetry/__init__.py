"""What a run shows: metrics, timers, sinks, the report."""
