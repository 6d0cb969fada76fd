"""Floating-point numbers."""
