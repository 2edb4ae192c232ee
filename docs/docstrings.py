"""The page of public names: docstrings have roles and examples of Sphinx, the page is Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


def to_markdown(docstring: str) -> str:
    """``:class:`~a.b.C``` reads ``C`` in code; examples become blocks of code."""
    text = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", docstring)
    return EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", text)


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """See the class."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
