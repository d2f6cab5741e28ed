"""VideoVAE+, arXiv 2412.17805."""
