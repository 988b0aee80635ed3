"""Attention and rotary positions as pure functions, on one device and on several.

`kernels` run on one device, `dispatch` chooses among them, `sharded` joins devices.
"""
