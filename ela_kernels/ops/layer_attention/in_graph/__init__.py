"""Whole layers in graphs that are being compiled: one operator for each, and one for its backward."""
