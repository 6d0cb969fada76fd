"""Autograd: graphs, calls of modules, operations; all that torch keeps to itself."""
