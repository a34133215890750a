"""From Hydra files and command-line overrides to one frozen, checked tree of dataclasses."""
