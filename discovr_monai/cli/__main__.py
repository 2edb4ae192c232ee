"""``python -m discovr_monai.cli`` does what ``discovr-monai`` does."""

import sys

from discovr_monai.cli import main

if __name__ == "__main__":
    sys.exit(main())
