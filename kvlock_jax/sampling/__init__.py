"""The sampling loop, its inputs, and its solvers as tables of coefficients."""
