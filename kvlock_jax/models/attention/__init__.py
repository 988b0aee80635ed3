"""Attention and rotary positions as pure functions, on one device and on several."""
