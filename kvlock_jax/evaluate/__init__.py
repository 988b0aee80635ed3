"""Measures an edit against its source (METHOD.md section 13)."""
