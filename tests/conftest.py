import os
import sys
from pathlib import Path

# Networks of a test are too small to share: a second thread brings nothing, and costs much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The suite is the CPU's, on every machine. What only a GPU can show is in on_gpu.py, run by its name.
if not any("on_gpu.py" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
