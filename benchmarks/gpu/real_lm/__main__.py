"""``python -m benchmarks.gpu.real_lm``."""

import sys

from benchmarks.gpu.real_lm.protocol import main

sys.exit(main())
