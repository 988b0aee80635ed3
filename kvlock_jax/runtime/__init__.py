"""Runs compiled programs: compiles them, caches their traces for other processes, and times stages.

Nothing here knows a model or an edit.
"""
