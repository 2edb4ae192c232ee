"""The notice that every output carries."""

from __future__ import annotations

# These 43 ASCII characters fit a DICOM long string (64) and NIfTI's descrip (80), so no place needs
# a shorter form.
NOTICE = "For research use only, not a medical device"
