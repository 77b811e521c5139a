"""Side-by-side measurements: each file one command that prints a ratio. Figures go to LOG.md, good or bad."""
