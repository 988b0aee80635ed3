"""Several devices and several hosts: the mesh, the rules of sharding, padding, agreement."""
