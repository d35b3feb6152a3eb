"""The main job: train one network under each strategy on the same text, compare, and draw."""
