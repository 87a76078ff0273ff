"""From raw documents to stores: what tools/prepare_data.py runs. `build.py` is the order of its stages.

    recipe.py    every key of a data experiment               sources/  files to documents
    plan.py      the stages it asks for, what each reads      rules/    what is done to each
    made.py      what a folder has of them, and is redone     dedup/    which of them stay
    work.py      runs them, on engine/, through shuffle.py    tokens/   documents to stores; chat/ of conversations
    finished.py  whether all is there                         card/     what a person sees of it
"""
