"""Seams to other libraries and tools, each in a module that is imported by its own name."""
