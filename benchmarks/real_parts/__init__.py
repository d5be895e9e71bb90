"""The pieces of `benchmarks.real_model`: what is compared, how it is scored, the page."""
