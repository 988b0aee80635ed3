"""Solvers as tables of coefficients, and the jitted loop that walks them."""
