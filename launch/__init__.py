"""One thin file per verb of the command line; no logic."""
