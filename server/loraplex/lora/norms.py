"""DoRA's norms, ‖W + scaling · B·A‖ of every output of a module: of one adapter on one base, and kept beside its files.

They need the base's weights and a product as large as the weight, so they are computed at an adapter's first load and
stored: norms-<base>.safetensors in the adapter's folder. A file that is missing, torn or of other modules is made anew.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

Norms = Mapping[str, torch.Tensor]
"""float32 [out_features] by module name."""

# Rows of W + scaling · B·A at a time: the sum is never in memory as a whole.
_CHUNK = 1024


def norm_of_rows(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖weight + scaling · b·a‖ of each row, in float32 on the CPU: weight [out, in], a [r, in], b [out, r] -> [out]
    (Liu et al. 2024, eq. 5, as PEFT's DoraLinearLayer computes it)."""
    a, b = a.float(), b.float()
    return torch.cat(
        [
            torch.linalg.vector_norm(rows.cpu().float() + scaling * (part @ a), dim=1)
            for rows, part in zip(weight.split(_CHUNK), b.split(_CHUNK), strict=True)
        ]
    )


class StoredNorms:
    """The norms of adapters on the base `fingerprint` (of weights in `dtype`)."""

    def __init__(self, fingerprint: str, dtype: torch.dtype):
        self._name = f"norms-{fingerprint[:32]}-{str(dtype).removeprefix('torch.')}.safetensors"

    def get(self, folder: Path, modules: Mapping[str, int], compute: Callable[[], Norms]) -> Norms:
        """The norms of the adapter in `folder` for `modules` (name -> out_features): stored, or computed and stored."""
        found = self._read(folder / self._name, modules)
        if found is None:
            found = compute()
            self._write(folder / self._name, found)
        return found

    def _read(self, path: Path, modules: Mapping[str, int]) -> Norms | None:
        try:
            with safe_open(path, framework="pt") as file:
                norms = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        shapes = {name: (norm.dtype, tuple(norm.shape)) for name, norm in norms.items()}
        expected = {name: (torch.float32, (size,)) for name, size in modules.items()}
        return norms if shapes == expected and checksum == _checksum(norms) else None

    def _write(self, path: Path, norms: Norms) -> None:
        """What cannot be stored is computed again next time."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(save(dict(norms), {"sha256": _checksum(norms)}))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)


def _checksum(norms: Norms) -> str:
    digest = hashlib.sha256()
    for name in sorted(norms):
        digest.update(name.encode())
        digest.update(norms[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
