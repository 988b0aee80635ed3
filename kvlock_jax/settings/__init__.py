"""A run's settings as frozen dataclasses that check their ranges."""
