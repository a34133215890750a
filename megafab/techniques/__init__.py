"""The papers: one file and one config each, behind one protocol (base)."""
