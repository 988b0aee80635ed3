"""Estimates an edit's cost: memory, arithmetic, and a lower bound of a step's time."""
