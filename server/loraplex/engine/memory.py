"""What can be allocated on a device now, and how much it has."""

import os
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now, with the limit of a Linux control group respected."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in meminfo.splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        available = max(available, pages)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(0, available)


def total_memory(device: torch.device) -> int:
    """Bytes of an accelerator's own memory; 0 where there is none to be shared out."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0


def free_cached_memory(device: torch.device) -> None:
    """Give what torch keeps for later back to an accelerator, after an allocation failed there. Waits for it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
