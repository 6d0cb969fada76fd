"""Stochastic gradient descent near a minimum."""
