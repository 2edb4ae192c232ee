"""Public data sets to datalists: one module each, found by its name.

A module holds ``TITLE``, ``LICENCE``, ``SOURCE`` (where to get it) and ``rows(root, ...)``, a
generator of :class:`~discovr_monai.base.types.DatalistRow` (``image`` relative to ``root``,
``patient`` as the set spells it, ``split`` where the set has one) and of :class:`CineError` for
what it sets aside. Its keyword arguments are the set's own keys. To add a set, add a module.
"""
