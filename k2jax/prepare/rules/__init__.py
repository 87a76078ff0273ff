"""What is done to a document after it is read: `rules.py` has the rules of a subset in their order."""
