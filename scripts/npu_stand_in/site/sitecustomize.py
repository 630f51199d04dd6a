"""Run by Python at the start of every process whose PYTHONPATH has this folder; see environment.py.

The process stays as it is until it imports torch_npu: then the stand-in's libraries are loaded first, as a
dynamic loader would have found CANN's, and then the arithmetic is installed. Forked children inherit both.
"""

import os
import sys

if os.environ.get("NPU_SIM_LIBRARIES"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from npu_stand_in.import_hook import install

    sys.path.pop()
    install()
