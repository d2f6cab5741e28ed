"""DeCo-VAE, arXiv 2511.14530."""
