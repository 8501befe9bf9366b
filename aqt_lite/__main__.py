"""``python -m aqt_lite`` is the command ``aqt-lite``.

Owns: nothing. Imports: the command line.
"""

import sys

from aqt_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
