"""Documents to token shards, and training rows from shards."""
