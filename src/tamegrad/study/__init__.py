"""Trains one network under each strategy on the same text, compares the runs and draws charts."""
