"""The collectives of ``torch.distributed`` that the rooms above use, by names that every supported
version has; what goes over the wire goes through here."""

from __future__ import annotations

import torch.distributed as dist

# torch 2.13 renames two.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_reduce = dist.all_reduce
all_to_all = dist.all_to_all_single
send_and_receive = dist.batch_isend_irecv
send, receive = dist.send, dist.recv
