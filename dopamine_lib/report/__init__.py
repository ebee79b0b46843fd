"""The privacy statement and model card of a finished run, checked by accounting for it again."""
