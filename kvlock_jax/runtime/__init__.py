"""How programs are compiled, cached and timed."""
