"""Does once whatever would take each process of `support.ranks` seconds on first use.

Imported by the fork server, which must not start threads.
"""

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer

torch.set_num_threads(1)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "columns"))
model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
parallelize_module(model, mesh["columns"], {"0": ColwiseParallel()})
fully_shard(model, mesh=mesh["rows"])
model(torch.ones(1, 2))
# No backward pass: in builds of PyTorch for GPUs it starts threads.
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
GradientNormalizer(model, Clip(1.0)).normalize_()
dist.destroy_process_group()
