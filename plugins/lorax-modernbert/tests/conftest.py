"""One thread for torch in this test process: for models as tiny as these, more threads only wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
