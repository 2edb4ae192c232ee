"""Self-contained HTML pages: one for a study, one for an evaluation; see :mod:`.page`."""
