"""Over which network a trial's workers reach each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch.config import TorchConfig, _TorchBackend


@dataclass
class NodeAddressConfig(TorchConfig):
    """PyTorch's process group, at the addresses that Ray knows the nodes by.

    Gloo would take the address that a host's name stands for, which is the loopback on hosts as Debian sets them up:
    workers on several of them would not find each other. NCCL looks for interfaces itself.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_node_address)
        super().on_start(worker_group, backend_config)


def _use_node_address() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
