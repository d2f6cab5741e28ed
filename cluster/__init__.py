"""Manifest -> workers: the command `moviola`, Ray Train, job submission. The only package that imports ray."""
