"""In-process benchmarks and load generators (`loraplex bench`)."""
