import os
import sys
from pathlib import Path

# Networks of a test are too small to share: a second thread brings nothing, and costs much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
