"""`python -m peftkern`: the command line, where its console script is not on the PATH."""

import sys

from peftkern.cli import main

sys.exit(main())
