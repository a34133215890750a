"""Which rank holds what: axis arithmetic (mesh) and the process groups made from it (groups)."""
