"""The group action: rescaling, conditioning, and checking that the function stays."""
