"""``python -m normuon_lens VERB``, as ``torchrun -m`` needs it: the same as ``normuon-lens``."""

import sys

from normuon_lens.cli.main import main

sys.exit(main())
