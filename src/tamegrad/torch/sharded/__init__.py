"""One sum over ranks: what sharded tensors say about themselves, and the collectives of plans and steps."""
