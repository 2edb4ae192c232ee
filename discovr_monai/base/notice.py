"""What every output says of itself, in one wording."""

from __future__ import annotations

# 43 ASCII characters: it fits a DICOM long string (64) and NIfTI's descrip (80), so that no
# shorter form is needed anywhere
NOTICE = "For research use only, not a medical device"
