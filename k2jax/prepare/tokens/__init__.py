"""Documents to pieces of stores, and sources that are tokens already."""
