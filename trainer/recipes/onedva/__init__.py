"""One-DVA, arXiv 2602.04220."""
