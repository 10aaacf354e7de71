"""Backends that run the rules or the machinery of other packages."""
