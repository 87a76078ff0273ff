"""The files of a source, local or remote, to documents: `listing.py` lists them, `read.py` reads."""
