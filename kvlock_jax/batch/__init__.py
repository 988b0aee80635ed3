"""Many edits from one manifest: reading it, grouping edits, running them, publishing results.

A run that was interrupted is started again and does the missing edits. `runner` runs them on this
machine; `cluster`, which imports Ray, spreads the same steps over many.
"""
