"""Models under study, behind one protocol."""
