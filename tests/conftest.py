"""One CPU thread: the test networks are so small that waiting for a second thread costs more than it gives."""

import torch

torch.set_num_threads(1)
