"""From raw documents to stores: what tools/prepare_data.py runs. `build.py` is the order of its stages."""
